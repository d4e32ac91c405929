"""Data as NumPy arrays: text corpora and the windows over them, labelled images, tables, and batches of them."""

from hyperjax.data.batches import (
    Batches,
    pad_crop_flip,
    permute_labels,
    permute_pixels,
    rotate,
    select_classes,
)
from hyperjax.data.census import load_census
from hyperjax.data.corpus import UNKNOWN
from hyperjax.data.images import Images, Split, load_images, normalise
from hyperjax.data.multitask import RowBatches, TaskData, TaskSplit, synthetic_regression
from hyperjax.data.multitask_images import digit_tasks, multi_mnist
from hyperjax.data.streams import Streams, evaluation_windows, window_at
from hyperjax.data.tables import Table, TableEncoder, Vocabulary, read_table
from hyperjax.data.text import Corpus, load_corpus
from hyperjax.data.text_classes import TextBatches, TextClasses, text_classes

__all__ = [
    "UNKNOWN",
    "Batches",
    "Corpus",
    "Images",
    "RowBatches",
    "Split",
    "Streams",
    "Table",
    "TableEncoder",
    "TaskData",
    "TaskSplit",
    "TextBatches",
    "TextClasses",
    "Vocabulary",
    "digit_tasks",
    "evaluation_windows",
    "load_census",
    "load_corpus",
    "load_images",
    "multi_mnist",
    "normalise",
    "pad_crop_flip",
    "permute_labels",
    "permute_pixels",
    "read_table",
    "rotate",
    "select_classes",
    "synthetic_regression",
    "text_classes",
    "window_at",
]
