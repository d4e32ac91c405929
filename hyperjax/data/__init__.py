"""Data as NumPy arrays: text corpora and the windows over them."""

from hyperjax.data.corpus import UNKNOWN
from hyperjax.data.streams import Streams, evaluation_windows
from hyperjax.data.text import Corpus, load_corpus

__all__ = ["UNKNOWN", "Corpus", "Streams", "evaluation_windows", "load_corpus"]
