"""Data as NumPy arrays: text corpora and the windows over them, labelled images and batches of them."""

from hyperjax.data.batches import (
    Batches,
    pad_crop_flip,
    permute_labels,
    permute_pixels,
    rotate,
    select_classes,
)
from hyperjax.data.corpus import UNKNOWN
from hyperjax.data.images import Images, Split, load_images, normalise
from hyperjax.data.streams import Streams, evaluation_windows
from hyperjax.data.text import Corpus, load_corpus

__all__ = [
    "UNKNOWN",
    "Batches",
    "Corpus",
    "Images",
    "Split",
    "Streams",
    "evaluation_windows",
    "load_corpus",
    "load_images",
    "normalise",
    "pad_crop_flip",
    "permute_labels",
    "permute_pixels",
    "rotate",
    "select_classes",
]
