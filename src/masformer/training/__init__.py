"""Continual training and fine-tuning: a recipe says everything, `train` carries it out on transformers' Trainer."""

from masformer.training.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
