"""The rows of the GPU benchmark's CSV."""

from dataclasses import dataclass

from benchmarks.head.providers.base import FORM_GEMMS, FORMS

PHASES: dict[str, tuple[str, ...]] = dict.fromkeys(FORMS, ("whole",)) | {
    "forward_backward": ("whole", "backward"),
    "frozen_weight": ("whole", "backward"),
}


@dataclass(frozen=True)
class Row:
    """One line of the CSV; the facts of the machine follow.

    Times and what follows from them are None unless status is "ok".
    """

    head: str
    form: str
    tokens: int
    phase: str
    provider: str
    with_entropy: bool
    dtype: str
    hidden_size: int
    vocabulary: int
    status: str
    n: int = 0  # timed calls
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None  # algorithmic, see gpu.py
    algorithmic_gemms: int = 0
    extra_mb: float | None = None
    logprob_error: float | None = None  # of the small shape, see correctness.py
    entropy_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    setting: str = ""
    versions: str = ""

    def case(self) -> tuple[str, int, str]:
        """The rows of one case were measured in turn."""
        return self.head, self.tokens, self.form


def algorithmic_gemms(form: str, phase: str) -> int:
    """Products of the head that no exact program of this form and phase can avoid."""
    return len(set(FORM_GEMMS[form]) - ({"logits"} if phase == "backward" else set()))
