"""Trains a model on under a plan.

python train_on.py MODEL TRAIN TEST OUT [PLAN] [--training.steps 200 ...]
"""

import sys

import yaml

from masformer import load_recipe, train


def main(name: str, data: str, test: str, out: str, plan: str = "full@11-18; window:512+4", *settings: str) -> None:
    recipe = {
        "output": out,
        "model": {"source": name, "plan": plan},
        "data": {"sources": {"train": {"files": [data]}}, "length": 4096},
        "training": {"steps": 50, "rows": 4, "learning_rate": 1e-4, "warmup_steps": 5, "checkpointing": True},
        "evaluation": {"sources": {"test": {"files": [test]}}, "lengths": [4096], "max_tokens": 8192, "every": 25},
        "checkpoints": {"every": 25},
    }
    with open(f"{out}.yaml", "w") as file:  # after an interruption: masformer train --config OUT.yaml --resume
        yaml.safe_dump(recipe, file)
    train(load_recipe(f"{out}.yaml", settings))
    print(f"{out}/model: load it with masformer.load_model")


if __name__ == "__main__":
    main(*sys.argv[1:])
