"""Consistency methods: accelerate launch train/consistency.py --config configs/fashion/lcm.yaml"""

from fewstep.cli.scripts import train

if __name__ == "__main__":
    train("consistency")
