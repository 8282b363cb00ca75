"""The providers compute one function on the inputs that all are given, the floor its products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.head import correctness
from benchmarks.head.floor import GemmFloor
from benchmarks.head.providers.base import FORM_GEMMS, FORMS, Step, make_inputs
from benchmarks.head.providers.plain_torch import PlainTorch
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure import timing
from benchmarks.measure.shapes import ACCURACY_SHAPE, SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE, Shape


def test_inputs_have_certain_tokens_and_the_asked_spread() -> None:
    inputs = make_inputs(ACCURACY_SHAPE, torch.float32, logit_std=5.0)
    logprobs_all = (inputs.hidden @ inputs.weight.T).log_softmax(-1)
    certain = logprobs_all.gather(1, inputs.targets[:, None]).exp().squeeze(1) > 0.5
    assert certain[::2].float().mean() > 0.5
    assert not certain[1::2].any()
    assert 4.5 < (inputs.hidden[1::2] @ inputs.weight.T).std() < 5.5
    again = make_inputs(ACCURACY_SHAPE, torch.float32, logit_std=5.0)
    assert torch.equal(inputs.weight, again.weight)
    assert torch.equal(inputs.hidden, again.hidden)


@pytest.mark.parametrize("form", FORMS)
def test_floor_runs_exactly_the_products_of_the_form(form: str) -> None:
    floor = GemmFloor(form, make_inputs(SMOKE_SHAPE, torch.float32), blocks=(100, 200))
    floor.tune(lambda call: timing.time_call(call))
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == len(FORM_GEMMS[form]) * SMOKE_SHAPE.gemm_flop()


# Importing torch's compiler, which torch.compile does even where it then compiles nothing.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shape", [SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE], ids=lambda s: s.name)
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_compute_the_same_function(name: str, shape: Shape) -> None:
    reason = PROVIDERS[name].missing()
    if reason is not None:
        pytest.skip(reason)
    provider = PROVIDERS[name]()
    if provider.needs_compiler or "cpu" not in provider.devices:
        pytest.skip("runs compiled or on a GPU only")
    tested = 0
    with torch.compiler.set_stance("force_eager"):
        for form in FORMS:
            for with_entropy in (False, True)[: 1 if form == "known_coefficients" else 2]:
                inputs = make_inputs(shape, torch.float32)
                if provider.reason_against(form, with_entropy, inputs) is None:
                    step = Step(provider, form, inputs, with_entropy=with_entropy)
                    found = correctness.errors(step)
                    assert correctness.beyond_limits(found, torch.float32) is None, form
                    assert correctness.objection(step, torch.float32) is None, form
                    assert (found.dhidden_error is None) == (form == "forward")
                    asked = form in ("forward_backward", "known_coefficients")
                    assert (found.dweight_error is not None) == asked
                    assert (found.entropy_error is not None) == with_entropy
                    tested += 1
    assert tested == 0 if shape.head.softcap and not provider.has_softcap else tested >= 4


def test_step_refuses_what_has_no_meaning() -> None:
    inputs = make_inputs(SMOKE_SHAPE, torch.float32)
    with pytest.raises(ValueError, match="form: expected one of"):
        Step(PlainTorch(), "backward", inputs, with_entropy=False)
    with pytest.raises(ValueError, match="no entropy"):
        Step(PlainTorch(), "known_coefficients", inputs, with_entropy=True)
