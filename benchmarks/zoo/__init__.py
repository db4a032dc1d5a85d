"""Every trainable model class of transformers, small, with a batch to train it on.

Nothing is downloaded: configs are the defaults made small, weights are random. Depends on torch and
transformers.
"""

from benchmarks.zoo.building import NotBuildable, build
from benchmarks.zoo.classes import ModelClass, trainable_classes

__all__ = ["ModelClass", "NotBuildable", "build", "trainable_classes"]
