"""How the next token is chosen. Apart from the rest, so that a command line can offer it without importing torch."""

from dataclasses import dataclass, field
from typing import Any

from ..training.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; each limit is applied in the order of the fields."""

    _argument_group_name = "sampling"

    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of one answer (clipped to the context)."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 makes used tokens rarer; 1 is off."})
    temperature: float = field(default=0.3, metadata={"help": "Divides the logits; 0 takes the most likely token."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k most likely tokens; 0 is off."})
    top_p: float = field(default=0.95, metadata={"help": "Sample from the tokens that hold this share; 1 is off."})

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more; 0 is greedy"),
            "top_k": (self.top_k >= 0, "0 or more; 0 is off"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (fits, limit) in checks.items():
            if not fits:
                raise UserError(f"{name}={getattr(self, name)} must be {limit}")

    def generate_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `generate()`, all but `max_new_tokens`."""
        if self.temperature == 0:
            return {"do_sample": False, "repetition_penalty": self.repetition_penalty}
        return {
            "do_sample": True,
            "repetition_penalty": self.repetition_penalty,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }
