"""ImageNet's thousand classes: what each is called, from timm's tables."""

from __future__ import annotations

from functools import cache

import timm.data

__all__ = ["IMAGENET_CLASSES", "imagenet_labels", "imagenet_names"]

IMAGENET_CLASSES = 1000


@cache
def imagenet_labels() -> tuple[str, ...]:
    """One name a class, the first of its synonyms, in the order of the logits."""
    return tuple(names[2] for names in imagenet_names())


@cache
def imagenet_names() -> tuple[tuple[str, ...], ...]:
    """Of each class its WordNet id, all its synonyms as one text, and each of them."""
    info = timm.data.ImageNetInfo("imagenet-1k")
    ids, descriptions = info.label_names(), map(info.index_to_description, range(info.num_classes()))
    return tuple((wordnet, text, *text.split(", ")) for wordnet, text in zip(ids, descriptions, strict=True))
