"""BOOT, data-free: accelerate launch train/boot.py --config configs/fashion/boot.yaml"""

from fewstep.cli.scripts import train

if __name__ == "__main__":
    train("boot")
