"""Continuous-time consistency models: accelerate launch train/scm.py --config configs/fashion/scm.yaml"""

from fewstep.cli.scripts import train

if __name__ == "__main__":
    train("scm")
