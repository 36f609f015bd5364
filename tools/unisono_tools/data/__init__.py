"""Text, bytes and frames as arrays of ids: where corpora come from, how they are split, and how minibatches are drawn."""

from unisono_tools.data.corpus import Corpus, characters_of, load_corpus
from unisono_tools.data.mixture import Mixture
from unisono_tools.data.store import SPLITS
from unisono_tools.data.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer

__all__ = ["SPLITS", "TOKENIZERS", "Corpus", "Mixture", "Tokenizer", "characters_of", "load_corpus", "load_tokenizer"]
