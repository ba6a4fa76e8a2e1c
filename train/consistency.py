"""Consistency distillation: accelerate launch train/consistency.py --config configs/consistency_fashion.yaml"""

from fewstep.job import run
from fewstep.methods.consistency import Consistency

if __name__ == "__main__":
    run(Consistency)
