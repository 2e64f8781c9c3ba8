"""check_trained: what it lets pass, and each way in which a trained tensor can stand still."""

from __future__ import annotations

import pytest
import torch

from swiftk.parallel.comm import SingleComm, run_threads
from swiftk.train import main
from swiftk.trainer import run as run_module
from swiftk.trainer.optimizer import build_optimizer
from swiftk.trainer.trained import TrainedCheck, UntrainedError
from tests.trainer import toy
from tests.trainer.test_lora import arguments, base, last_of  # noqa: F401 (a fixture)


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float32))


def made(params, comm=None):
    lines: list[str] = []
    return TrainedCheck(params, comm or SingleComm(), lines.append), lines


def step(params, check, number, rate=0.1, move=True, rates=None, **gradients):
    """SGD with the given gradients, by the last part of the name; rates: of names, in place of `rate`."""
    for name, p in params.items():
        p.grad = torch.tensor(gradients.get(name.rsplit(".", 1)[-1], [0.0] * len(p)))
    each = dict.fromkeys(params, rate) if rates is None else rates
    optimizer = torch.optim.SGD([{"params": [params[name]], "lr": r} for name, r in each.items()])
    if move:
        optimizer.step()
    check.after_step(number, optimizer)


def test_a_new_adapter_moves_in_two_steps():
    params = {"m.lora_A": parameter(1, 2), "m.lora_B": parameter(0, 0)}
    check, lines = made(params)
    step(params, check, 1, rate=0.0, lora_B=[1.0, 0.0])  # the rate of a warm-up that starts at 0
    assert lines == []
    step(params, check, 2, lora_B=[1.0, 0.0])
    assert lines == [
        "check_trained: 1 of 2 trained tensors have moved after step 2; "
        "1 have their first gradient in the next: the other factor of the adapter was zero"
    ]
    step(params, check, 3, lora_A=[1.0, 0.0], lora_B=[1.0, 0.0])
    step(params, check, 4)  # later steps are not looked at
    check.at_end()
    assert lines[1:] == [f"check_trained: 2 of 2 trained tensors have moved {when}" for when in ("after step 3", "at the end")]


def test_one_step_is_enough_for_one_factor():
    params = {"e.lora_embedding_A": parameter(0, 0), "e.lora_embedding_B": parameter(1, 2)}
    check, lines = made(params)
    check.at_end()
    assert lines == ["check_trained: no step was made, nothing is checked"]
    step(params, check, 1, lora_embedding_A=[1.0, 0.0])
    check.at_end()
    assert lines[-1] == "check_trained: 1 of 2 trained tensors have moved at the end, 1 wait for a second step"


@pytest.mark.parametrize("steps", [1, 2])
def test_a_gradient_that_is_zero(steps):
    """Though weight decay moves the tensor; of a factor only in the second step."""
    params = {"m.lora_A": parameter(1, 2), "m.lora_B": parameter(0, 0) if steps == 2 else parameter(1, 1)}
    check, _ = made(params)
    with torch.no_grad():
        params["m.lora_A"] *= 0.999
    if steps == 2:
        step(params, check, 1, lora_B=[1.0, 1.0])
    with pytest.raises(UntrainedError, match=rf"step {steps}: 1 of 2 trained tensors do not learn, .*: m\.lora_A: its grad"):
        step(params, check, steps, lora_B=[1.0, 1.0])


def test_an_update_that_is_not_made():
    params = {"a.weight": parameter(1, 1), "b.bias": parameter(1, 1)}
    both = {"weight": [2.0, 1.0], "bias": [2.0, 1.0]}
    check, _ = made(params)
    with pytest.raises(UntrainedError, match=r"2 of 2 .*\n  b\.bias: its gradient is up to 2, its rate 0\.1, and the opt"):
        step(params, check, 1, move=False, **both)
    check, _ = made(params)
    with pytest.raises(UntrainedError, match=r"1 of 2 .*: b\.bias: it is not in the optimizer"):
        step(params, check, 1, rates={"a.weight": 0.1}, **both)
    check, _ = made(params)
    with pytest.raises(UntrainedError, match=r"1 of 2 .*: b\.bias: its learning rate is 0"):
        step(params, check, 1, rates={"a.weight": 0.1, "b.bias": 0.0}, **both)


def test_an_update_that_is_lost_in_rounding():
    """In the first steps the rate may be too small to show, at the end not."""
    params = {"m.lora_A": parameter(1, 1), "m.lora_B": parameter(0, 0)}
    check, lines = made(params)
    for number in (1, 2):
        step(params, check, number, rate=1e-8, lora_A=[0.0, number - 1.0], lora_B=[1.0, 1.0])
    assert lines[1:] == ["check_trained: 1 of 2 trained tensors have moved after step 2"]
    with pytest.raises(UntrainedError, match=r"the end, 2 steps: 1 of 2 .* m\.lora_A: it has not moved: its updates are lost"):
        check.at_end()


def test_ranks_that_part():
    errors = []

    def rank(comm):
        params = {"a.weight": parameter(1, 1), "b.weight": parameter(1, 1)}
        check, _ = made(params, comm)
        try:
            step(params, check, 1, weight=[1.0, 1.0 + comm.rank])
        except UntrainedError as error:
            errors.append(str(error))

    run_threads(2, rank)
    assert len(errors) == 2 and errors[0] == errors[1]
    assert "the ranks have parted: 2 of 2" in errors[0] and "a.weight: its values are not the same on all ranks" in errors[0]


def test_in_a_run(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    keys = arguments(base, tmp_path, check_trained=True, weight_decay=0.0, max_steps=2, save_steps=0)
    run_threads(2, lambda comm: toy.launch({**keys, "optim": "adamw_8bit"}, comm))
    text = capsys.readouterr().out
    assert "check_trained: 14 of 28 trained tensors have moved after step 1; 14 have their first gradient in the next" in text
    assert "check_trained: 28 of 28 trained tensors have moved at the end" in text

    def without_one(params, *rest):
        return build_optimizer({n: p for n, p in params.items() if n != "model.layers.0.self_attn.k_proj.lora_B"}, *rest)

    with monkeypatch.context() as broken, pytest.raises(UntrainedError, match=r"step 1: 1 of 28 .*k_proj\.lora_B: it is not"):
        broken.setattr(run_module, "build_optimizer", without_one)
        toy.launch({**keys, "output_dir": str(tmp_path / "broken")})

    threads = torch.get_num_threads()
    still = {**keys, "learning_rate": 0, "output_dir": str(tmp_path / "still")}
    command = toy.argv({k: v for k, v in still.items() if k not in ("model_config", "tokenizer")})
    assert main(command) == 1
    torch.set_num_threads(threads)
    err = capsys.readouterr().err
    assert "check_trained: the end, 2 steps: 28 of 28 trained tensors do not learn, wants all: " in err
    assert "it has not moved: the rate was 0 in every step" in err and "and 18 more" in err
    assert (tmp_path / "still" / "last").resolve().name == "checkpoint-2"  # the work is saved before it is judged
