"""Publishing: the model card, its machine-readable results, and the push to the Hub."""

from .card import make_card, validate_card, write_card
from .checkpoint import push_folder
from .pictures import draw_pictures


__all__ = ["draw_pictures", "make_card", "push_folder", "validate_card", "write_card"]
