"""Distribution matching with a GAN: accelerate launch train/dmd2.py --config configs/fashion/dmd2.yaml"""

from fewstep.cli.scripts import train

if __name__ == "__main__":
    train("dmd2")
