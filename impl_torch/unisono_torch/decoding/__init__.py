"""Generation on a GPU: one CUDA graph a batch size reads a token and chooses the next, with nothing on the host between tokens."""

from unisono_torch.decoding.decoder import Decoder, follower

__all__ = ["Decoder", "follower"]
