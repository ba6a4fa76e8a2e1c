"""A teacher from scratch: python train/teacher.py --config configs/teachers/fashion.yaml"""

from fewstep.cli.scripts import train_a_teacher

if __name__ == "__main__":
    train_a_teacher()
