from __future__ import annotations

import csv
import errno
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from pycnf import records
from pycnf.fields import MLP
from pycnf.flow import CNF
from pycnf.records import read_json, write_json
from pycnf.regularizers import TPR
from pycnf.solution import SolveError
from pycnf.solve import Solver
from pycnf.training import (
    FitResult,
    TrainingError,
    TrainingInterrupted,
    TrainingOptions,
    evaluate,
    fit,
    load_flow,
    save_flow,
    task,
)
from pycnf.training.batches import Batches
from pycnf.training.folder import read_checkpoint

QUICK = {"batch_size": 32, "device": "cpu", "progress": False}


MIX = torch.tensor([[2.0, 0.0], [0.5, 0.5]])


def gaussian(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise @ MIX.double() + 1).to(dtype)


def small_flow(seed: int = 0, **settings: Any) -> CNF:
    torch.manual_seed(seed)
    return CNF(2, **{"hidden": (8,), **settings})


def weights(flow: CNF) -> list[Tensor]:
    return [p.detach().clone() for p in flow.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class At(Callback):
    """Do something at the end of one step, or before it."""

    def __init__(self, step: int, action: Any, *, before: bool = False) -> None:
        self.step, self.action, self.before = step, action, before

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.before and trainer.global_step + 1 == self.step:
            self.action(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not self.before and trainer.global_step == self.step:
            self.action(trainer)


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


# ---- what training does ----


def test_training_improves_the_held_out_nll_and_approaches_the_truth() -> None:
    held_out = gaussian(512, seed=1)
    flow = small_flow(hidden=(16, 16))
    before = evaluate(flow, held_out).nll
    result = fit(flow, gaussian(1024), held_out, max_steps=120, validate_every=40, lr=2e-2, **QUICK)
    truth = torch.distributions.MultivariateNormal(torch.ones(2), MIX.T @ MIX)
    best = -truth.log_prob(held_out).mean().item()
    assert result.nll is not None
    assert result.nll < before - 0.3
    assert best - 0.02 < result.nll < best + 0.1
    assert result.nll == pytest.approx(evaluate(flow, held_out, batch_size=32).nll, abs=1e-6)
    assert result.steps == 120
    assert result.stopped == "max_steps"
    assert not result.interrupted
    assert not flow.training


def test_the_best_weights_come_back() -> None:
    held_out = gaussian(64, seed=1)
    flow = small_flow()
    result = fit(flow, gaussian(256), held_out, max_steps=12, validate_every=3, lr=0.3, schedule="constant", **QUICK)
    nlls = {row["step"]: row["nll"] for row in result.rows("validation")}
    assert list(nlls) == [3, 6, 9, 12]
    assert result.nll == min(nlls.values())
    assert nlls[result.best_step] == result.nll
    assert evaluate(flow, held_out, batch_size=32).nll == pytest.approx(result.nll, abs=1e-6)


class Counting(nn.Module):
    """Wrap a field and count its calls, those in training apart."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += self.training
        return self.field(t, z)


@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_logged_evaluations_equal_the_calls_of_the_users_own_field(gradient: str) -> None:
    torch.manual_seed(0)
    fields = [Counting(MLP(2, (8,))) for _ in range(2)]
    flow = CNF(2, blocks=2, field=fields, solver=Solver(rtol=1e-3, atol=1e-3, gradient=gradient))
    result = fit(flow, gaussian(64), gaussian(32, 1), regularizers=TPR(), max_steps=3, **QUICK)
    rows = result.rows("train")
    assert sum(row["nfe"] + row["nfe_backward"] for row in rows) == sum(field.calls for field in fields)
    assert result.nfe_train == sum(row["nfe"] for row in rows) / 3
    assert result.nfe_backward == sum(row["nfe_backward"] for row in rows) / 3
    assert (result.nfe_backward > 0) == (gradient == "adjoint")


def test_history_has_every_step_and_the_penalties_are_unweighted() -> None:
    result = fit(small_flow(), gaussian(64), regularizers=[TPR(weight=5.0), TPR(weight=2.0)], max_steps=4, **QUICK)
    rows = result.rows("train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        penalty = 5 * row["penalty_tpr"] + 2 * row["penalty_tpr-1"]
        assert row["loss"] == pytest.approx(row["nll"] + penalty, rel=1e-5)
        assert row["accepted"] >= 1
        assert row["seconds"] > 0
    assert result.seconds == pytest.approx(sum(row["seconds"] for row in rows))
    assert result.nll is None


def test_plateau_drops_the_rate_twice_then_stops() -> None:
    flow = small_flow()
    start = flow.fields[0]
    for p in start.parameters():
        nn.init.zeros_(p)  # the identity, the best flow for these data: nothing to gain
    same = torch.tensor([[1.0, -1.0]] * 32)
    result = fit(flow, same, same * 0, max_steps=100, validate_every=2, patience=3, lr_drops=2, lr=1e-6, **QUICK)
    rates = [row["lr"] for row in result.rows("train")]
    assert result.stopped == "plateau"
    # the first validation sets the best value; then patience validations before each drop and before the stop
    assert result.steps == 2 * (1 + 3 * 3)
    assert rates == pytest.approx([1e-6] * 8 + [1e-7] * 6 + [1e-8] * 6, rel=1e-6)


def test_cosine_and_constant_schedules() -> None:
    rates = [row["lr"] for row in fit(small_flow(), gaussian(64), max_steps=8, lr=0.1, **QUICK).rows("train")]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * s / 8)) for s in range(8)])
    result = fit(small_flow(), gaussian(64), max_steps=3, lr=0.1, schedule="constant", **QUICK)
    assert [row["lr"] for row in result.rows("train")] == [0.1] * 3
    assert result.options.schedule == "constant"


def test_gradient_clipping() -> None:
    norms: list[float] = []

    def look(trainer: Any) -> None:
        gradients = [p.grad for p in trainer.lightning_module.parameters()]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    for clip in (None, 0.01):
        fit(small_flow(), 10 * gaussian(64), max_steps=1, clip=clip, callbacks=[At(1, look)], **QUICK)
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax"])
def test_optimizers(optimizer: Any) -> None:
    flow = small_flow()
    fit(flow, gaussian(64), max_steps=2, optimizer=optimizer, weight_decay=0.1, **QUICK)
    assert not equal(weights(flow), weights(small_flow()))


def test_conditional_flow() -> None:
    context = torch.linspace(-1, 1, 96)[:, None]
    x = gaussian(96) + 3 * context
    flow = small_flow(context=1)
    result = fit(flow, x, x, train_context=context, validation_context=context, max_steps=30, lr=3e-2, **QUICK)
    assert result.nll is not None
    shuffled = evaluate(flow, x, context.flip(0)).nll
    assert evaluate(flow, x, context).nll < shuffled - 0.1


def test_numpy_data_of_another_precision_is_converted() -> None:
    a, b = small_flow(), small_flow()
    x = gaussian(64, dtype=torch.float64)
    fit(a, x.numpy(), max_steps=2, **QUICK)
    fit(b, x.float(), max_steps=2, **QUICK)
    assert equal(weights(a), weights(b))
    double = small_flow().double()
    fit(double, x.float(), max_steps=1, **QUICK)
    assert next(double.parameters()).dtype == torch.float64


# ---- reproducibility ----


def test_same_seed_same_weights_and_other_seed_other_weights() -> None:
    flows = [small_flow(divergence="hutchinson") for _ in range(3)]
    for flow, seed in zip(flows, (0, 0, 1), strict=True):
        torch.manual_seed(random.randrange(1000))  # the state from before must not matter
        fit(flow, gaussian(64), regularizers=TPR(), max_steps=4, seed=seed, **QUICK)
    assert equal(weights(flows[0]), weights(flows[1]))
    assert not equal(weights(flows[0]), weights(flows[2]))


def test_global_generators_are_left_alone() -> None:
    flow, x, held_out = small_flow(), gaussian(64), gaussian(32)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    fit(flow, x, held_out, max_steps=2, **QUICK)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert before[2] == random.getstate()


def test_batches_visit_every_row_once_an_epoch_and_start_anywhere() -> None:
    rows = torch.arange(10.0)[:, None], torch.arange(10.0)[:, None]
    stream = iter(Batches(rows, 5, seed=3))
    taken = [next(stream) for _ in range(6)]
    for epoch in range(3):
        seen = torch.cat([x for x, _ in taken[2 * epoch : 2 * epoch + 2]])
        assert sorted(seen.flatten().tolist()) == list(range(10))
    assert all(context is not None and torch.equal(x, context) for x, context in taken)
    late = iter(Batches(rows, 5, seed=3, start=3))
    assert torch.equal(next(late)[0], taken[3][0])
    assert not torch.equal(taken[0][0], taken[2][0])


# ---- run folder, resume ----


def run(folder: Path | None, steps: int, flow: CNF | None = None, **settings: Any) -> tuple[CNF, FitResult]:
    """Train with everything that is random switched on."""
    flow = small_flow(divergence="hutchinson", solver={"rtol": 1e-2, "atol": 1e-2}) if flow is None else flow
    options = {
        "max_steps": steps,
        "validate_every": 4,
        "patience": 1,
        "lr": 1e-2,
        "clip": 1.0,
        "weight_decay": 1e-3,
    }
    terms = [TPR(weight=5.0)]
    data = gaussian(100), gaussian(40, 1)
    return flow, fit(flow, *data, regularizers=terms, output=folder, **{**QUICK, **options, **settings})


def last_state(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / "last.ckpt")


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert_same(a[part], b[part])


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for p, q in zip(a, b, strict=True):
            assert_same(p, q)
    else:
        assert a == b


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("first", [6, 8])
def test_resume_is_exact(tmp_path: Path, first: int) -> None:
    straight, expected = run(tmp_path / "straight", 16)
    run(tmp_path / "halves", first)
    resumed, result = run(
        tmp_path / "halves",
        16,
        resume=True,
        flow=small_flow(7, divergence="hutchinson", solver={"rtol": 1e-2, "atol": 1e-2}),
    )
    assert equal(weights(straight), weights(resumed))
    assert_same_state(last_state(tmp_path / "straight"), last_state(tmp_path / "halves"))
    assert result.nll == expected.nll
    assert plain(result.rows("train")) == plain(expected.rows("train"))
    assert result.nfe_train == expected.nfe_train
    assert read_json(tmp_path / "halves" / "config.json")["resumed"][0]["step"] == first


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
@pytest.mark.parametrize("before", [False, True])
def test_resume_after_an_interrupt_is_exact(tmp_path: Path, schedule: str, before: bool) -> None:
    _, expected = run(tmp_path / "straight", 12, schedule=schedule)
    with pytest.raises(TrainingInterrupted, match=r"after step (6|7); go on from step \d .*resume=True") as caught:
        run(tmp_path / "broken", 12, schedule=schedule, callbacks=[At(7, interrupt, before=before)])
    assert caught.value.result.interrupted
    assert read_json(tmp_path / "broken" / "record.json")["status"] == "interrupted"
    load_flow(tmp_path / "broken")
    _, result = run(tmp_path / "broken", 12, schedule=schedule, resume=True)
    assert_same_state(last_state(tmp_path / "straight"), last_state(tmp_path / "broken"))
    assert plain(result.history) == plain(expected.history)


def test_interrupt_between_steps_saves_that_step(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 12, callbacks=[At(7, interrupt)])
    assert last_state(tmp_path)["global_step"] == 7
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["split"] == "train"] == list("1234567")


def test_interrupt_within_a_step_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 12, callbacks=[At(7, interrupt, before=True)])
    assert last_state(tmp_path)["global_step"] == 4


def test_a_signal_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        pytest.skip("another handler of SIGINT is installed")
    press = At(7, lambda _: os.kill(os.getpid(), signal.SIGINT), before=True)
    with pytest.raises(TrainingInterrupted, match="after step 7"):
        run(tmp_path, 12, callbacks=[press])
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_state(tmp_path)["global_step"] == 7


def test_termination_saves_the_state(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "broken", 12, callbacks=[At(6, lambda _: os.kill(os.getpid(), signal.SIGTERM))])
    assert last_state(tmp_path / "broken")["global_step"] == 6
    assert read_json(tmp_path / "broken" / "record.json")["status"] == "interrupted"
    run(tmp_path / "straight", 12)
    run(tmp_path / "broken", 12, resume=True)
    assert_same_state(last_state(tmp_path / "straight"), last_state(tmp_path / "broken"))


def test_resuming_a_finished_run_gives_its_result(tmp_path: Path) -> None:
    flow, first = run(tmp_path, 6)
    again, second = run(tmp_path, 6, resume=True)
    assert equal(weights(flow), weights(again))
    assert (second.nll, second.best_step, second.steps) == (first.nll, first.best_step, first.steps)
    assert plain(second.history) == plain(first.history)


def test_run_folder_says_everything_about_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flow, result = run(tmp_path / "run", 8, data_name="gaussian")
    assert result.folder == tmp_path / "run"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # and no lightning_logs
    names = {"config.json", "metrics.csv", "tensorboard", "model.safetensors", "last.ckpt", "record.json"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    config = read_json(tmp_path / "run" / "config.json")
    assert TrainingOptions(**config["training"]) == result.options
    assert config["flow"] == flow.config
    assert config["regularizers"] == "tpr:weight=5"
    assert config["data"]["name"] == "gaussian"
    assert config["data"]["train_rows"] == 100
    record = read_json(tmp_path / "run" / "record.json")
    assert record["status"] == "finished"
    assert record["nll"] == result.nll
    wanted = {"data", "regularizer", "seed", "rtol", "atol", "nll", "nfe_train", "nfe_backward", "seconds"}
    assert wanted | {"device", "versions", "command", "date", "started", "threads", "steps"} <= set(record)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.history) == 10
    assert float(rows[0]["loss"]) == result.history[0]["loss"]
    loaded = load_flow(tmp_path / "run")
    assert equal(weights(loaded), weights(flow))


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    run(tmp_path, 4)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run \(status: finished\).*resume=True.*overwrite=True"):
        run(tmp_path, 4, seed=1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    _, result = run(tmp_path, 4, seed=1, overwrite=True)
    assert result.steps == 4
    assert (tmp_path / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.5}, "with other settings: training.lr was 0.01 and is now 0.5"),
        ({"seed": 1}, "training.seed was 0 and is now 1"),
        ({"steps": 3}, "already at step 6: ask for more than 3 steps"),
        ({"flow": CNF(2, hidden=(4,), divergence="hutchinson")}, r"flow.hidden was \[8\] and is now \[4\]"),
        ({"overwrite": True}, "resume and overwrite exclude each other"),
    ],
)
def test_resume_with_other_settings_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    run(tmp_path, 6)
    config = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, settings.pop("steps", 8), resume=True, **settings)
    assert (tmp_path / "config.json").read_bytes() == config


def test_resume_with_another_solver_is_allowed_and_noted(tmp_path: Path) -> None:
    run(tmp_path, 4)
    run(
        tmp_path,
        6,
        resume=True,
        flow=small_flow(divergence="hutchinson", solver={"rtol": 1e-4, "atol": 1e-2}),
    )
    config = read_json(tmp_path / "config.json")
    assert config["flow"]["solver"]["rtol"] == 1e-4
    assert config["resumed"][0]["changed"] == {"flow.solver.rtol": 1e-2, "training.max_steps": 4}


def test_resume_needs_a_sound_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume: .* holds no last\.ckpt"):
        run(tmp_path / "nothing", 4, resume=True)
    run(tmp_path, 4)
    data = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        run(tmp_path, 8, resume=True)


# ---- what can go wrong ----


class Exploding(nn.Module):
    """A field that grows beyond all bounds after some calls in training."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(2)), calls

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls -= self.training
        return 0.1 * self.scale * z * (float("nan") if self.calls < 0 else 1)


def test_a_failed_solve_names_step_and_folder_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    flow = CNF(2, field=Exploding(200), solver={"rtol": 1e-3, "atol": 1e-3})
    with pytest.raises(
        TrainingError, match=r"training failed in step \d+: dopri5 failed at t = .*is kept in"
    ) as caught:
        fit(flow, gaussian(64), max_steps=100, validate_every=5, output=tmp_path, **QUICK)
    assert isinstance(caught.value.__cause__, SolveError)
    assert caught.value.folder == tmp_path
    kept = last_state(tmp_path)["global_step"]
    assert kept == (caught.value.step - 1) // 5 * 5 > 0
    record = read_json(tmp_path / "record.json")
    assert record["status"] == "failed"
    assert "dopri5" in record["error"]
    with (tmp_path / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == caught.value.step - 1  # what led to the failure is there
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert not flow.training


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights() -> None:
    flow = small_flow()

    def spoil(_: Any) -> None:
        with torch.no_grad():
            for p in flow.parameters():
                p.mul_(0).add_(1e30)

    with pytest.raises(TrainingError, match="training failed in step 3"):
        fit(flow, gaussian(64), gaussian(32), max_steps=9, validate_every=1, callbacks=[At(2, spoil)], **QUICK)
    assert evaluate(flow, gaussian(32)).nll < 10  # the best weights are back


def test_a_held_out_nll_that_is_not_finite_is_told() -> None:
    field = Counting(MLP(2, (8,)))
    field.forward = lambda t, z: field.field(t, z) * (1 if field.training else 1e25)  # type: ignore[method-assign]
    flow = CNF(2, field=field, eval_solver={"method": "euler", "n_steps": 1})
    message = "training failed in the validation after step 2: the held-out NLL is (inf|nan)"
    with pytest.raises(TrainingError, match=message):
        fit(flow, gaussian(64), gaussian(32), max_steps=4, validate_every=2, **QUICK)


def test_interrupt_before_the_first_step(tmp_path: Path) -> None:
    class Early(Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match=r"after step 0$"):
        run(tmp_path, 4, callbacks=[Early()])
    with pytest.raises(ValueError, match=r"holds a run \(status: interrupted\)"):
        run(tmp_path, 4)
    run(tmp_path, 4, overwrite=True)


def test_interrupt_in_a_validation_repeats_it_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "straight", 12)
    whole = task.evaluate_rows

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="after step 8; go on from step 8"):
        run(
            tmp_path / "broken",
            12,
            callbacks=[At(7, lambda _: monkeypatch.setattr(task, "evaluate_rows", stop))],
        )
    monkeypatch.setattr(task, "evaluate_rows", whole)
    run(tmp_path / "broken", 12, resume=True)
    assert_same_state(last_state(tmp_path / "straight"), last_state(tmp_path / "broken"))


def test_full_disk_at_a_checkpoint_keeps_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = records._write

    def fill(_: Any) -> None:
        def half(file: Any, data: bytes) -> None:
            if "last.ckpt" in str(file.name):
                file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, data)

        monkeypatch.setattr(records, "_write", half)

    with pytest.raises(
        OSError, match=r"could not write .*last\.ckpt: No space left on device; the earlier file is kept"
    ):
        run(tmp_path, 12, callbacks=[At(5, fill)])
    monkeypatch.undo()
    assert last_state(tmp_path)["global_step"] == 4
    assert read_json(tmp_path / "record.json")["status"] == "failed"
    assert not list(tmp_path.glob(".*.part"))
    load_flow(tmp_path)
    run(tmp_path, 12, resume=True)
    run(tmp_path / "straight", 12)
    assert_same_state(last_state(tmp_path / "straight"), last_state(tmp_path))


def test_output_must_be_a_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, but there is a file at"):
        run(tmp_path / "file", 4)
    with pytest.raises(ValueError, match="expected a folder, but there is a file at"):
        run(tmp_path / "file" / "below", 4)


X = gaussian(64)


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        (torch.randn(64, 3), {}, r"expected train of shape \(N, 2\), got \(64, 3\)"),
        (torch.randn(64), {}, r"expected train of shape \(N, 2\), got \(64,\)"),
        (torch.empty(0, 2), {}, "expected train to have at least one row"),
        (
            torch.ones(64, 2, dtype=torch.long),
            {},
            r"floating-point numbers, got torch\.int64: .*dequantization",
        ),
        (np.array([["a", "b"]]), {}, "expected train to hold real numbers"),
        (
            torch.where(torch.arange(64)[:, None] == 5, math.nan, X),
            {},
            r"holds 2 NaN or infinite .* row 5, column 0",
        ),
        (1e300 * gaussian(64, dtype=torch.float64), {}, r"NaN or infinite in torch\.float32"),
        (X, {"validation": torch.randn(8, 1)}, r"expected validation of shape \(N, 2\), got \(8, 1\)"),
        (X, {"batch_size": 65}, "batch_size 65 is larger than the 64 training rows"),
        (X, {"schedule": "plateau"}, "schedule 'plateau' needs validation data"),
        (X, {"schedule": "steps"}, "unknown schedule 'steps': choose one of auto, plateau"),
        (X, {"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        (X, {"max_steps": 0}, "expected an integer max_steps >= 1, got 0"),
        (X, {"max_steps": 2.5}, r"expected an integer max_steps >= 1, got 2\.5"),
        (X, {"lr": math.nan}, "expected a finite lr > 0, got nan"),
        (X, {"weight_decay": -1.0}, "expected a finite weight_decay >= 0"),
        (X, {"clip": 0.0}, "expected a finite clip > 0"),
        (X, {"seed": -1}, "expected an integer seed >= 0"),
        (X, {"device": "gpu"}, "unknown device 'gpu': choose auto, cpu, cuda or cuda:N"),
        (X, {"train_context": X}, "train_context was given, but the flow has no context"),
        (X, {"validation_context": X}, "validation_context was given without validation"),
        (X, {"resume": True}, "resume and overwrite need the run folder"),
    ],
)
def test_bad_input_gives_one_clear_message(train: Any, settings: dict[str, Any], message: str) -> None:
    flow = small_flow()
    with pytest.raises(ValueError, match=message):
        fit(flow, train, **{"max_steps": 1, **QUICK, **settings})
    assert equal(weights(flow), weights(small_flow()))


def test_context_must_fit() -> None:
    flow = small_flow(context=2)
    with pytest.raises(ValueError, match=r"expected train_context of shape \(64, 2\), got None"):
        fit(flow, X, max_steps=1, **QUICK)
    with pytest.raises(ValueError, match=r"expected train_context of shape \(64, 2\), got \(63, 2\)"):
        fit(flow, X, train_context=X[1:], max_steps=1, **QUICK)


def test_a_flow_without_parameters_is_refused() -> None:
    flow = small_flow().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters to train"):
        fit(flow, X, max_steps=1, **QUICK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device 'cuda' asked for, but torch sees no GPU"):
        fit(small_flow(), X, max_steps=1, **{**QUICK, "device": "cuda"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_run_comes_back_to_the_cpu() -> None:
    flow = small_flow()
    result = fit(flow, X, X, regularizers=TPR(), max_steps=4, **{**QUICK, "device": "auto"})
    assert next(flow.parameters()).device.type == "cpu"
    assert "cpu" not in result.device.lower()


# ---- evaluation, saving and loading ----


def test_evaluate_does_not_depend_on_the_batches_and_keeps_the_mode() -> None:
    flow = small_flow(eval_solver={"rtol": 1e-8, "atol": 1e-8}).double().train()
    x = gaussian(50, dtype=torch.float64)
    whole, parts = evaluate(flow, x), evaluate(flow, x.numpy(), batch_size=16)
    assert whole.nll == pytest.approx(parts.nll, abs=1e-6)
    assert whole.nll_se == pytest.approx(flow.eval()().log_prob(x).std().item() / 50**0.5, rel=1e-6)
    flow.train()
    assert evaluate(flow, x).rows == 50
    assert flow.training
    assert all(module.training for module in flow.modules())
    assert (whole.method, whole.rtol, whole.atol) == ("dopri5", 1e-8, 1e-8)
    loose = evaluate(flow, x, solver=Solver(rtol=1e-2, atol=1e-2))
    assert loose.nfe < whole.nfe
    assert loose.rtol == 1e-2
    assert all(p.grad is None for p in flow.parameters())


def test_evaluate_counts_the_calls() -> None:
    field = Counting(MLP(2, (8,)))
    flow = CNF(2, field=field)
    calls = 0
    forward = field.forward

    def count(t: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(t, z)

    field.forward = count  # type: ignore[method-assign]
    result = evaluate(flow, gaussian(30), batch_size=10)
    assert result.nfe * 3 == calls


def test_evaluate_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"expected data of shape \(N, 2\)"):
        evaluate(small_flow(), torch.randn(4, 3))
    with pytest.raises(ValueError, match="expected an integer batch_size >= 1"):
        evaluate(small_flow(), X, batch_size=0)


def test_save_and_load(tmp_path: Path) -> None:
    flow = small_flow(blocks=2, activation="softplus", solver={"rtol": 1e-3, "method": "bosh3"}).double()
    save_flow(flow, tmp_path / "deep" / "flow")
    loaded = load_flow(tmp_path / "deep" / "flow")
    assert loaded.config == flow.config
    assert equal(weights(loaded), weights(flow))
    x = gaussian(8, dtype=torch.float64)
    assert torch.equal(loaded().log_prob(x), flow.eval()().log_prob(x))


def test_load_into_a_flow_with_a_field_of_its_own(tmp_path: Path) -> None:
    flow = CNF(2, field=Counting(MLP(2, (8,))))
    save_flow(flow, tmp_path)
    with pytest.raises(ValueError, match=r"a field of its own \(Counting\): .*into=flow"):
        load_flow(tmp_path)
    other = CNF(2, field=Counting(MLP(2, (8,))))
    assert load_flow(tmp_path, into=other) is other
    assert equal(weights(other), weights(flow))


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_flow(tmp_path / "missing")
    save_flow(small_flow(), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the flow: expected .* of shape"):
        load_flow(tmp_path, into=small_flow(hidden=(9,)))
    with pytest.raises(ValueError, match=r"does not fit the flow: .* is missing"):
        load_flow(tmp_path, into=small_flow(blocks=2))
    write_json(tmp_path / "config.json", {"flow": {"features": 2, "wings": 2}})
    with pytest.raises(ValueError, match=r"does not describe a flow of this version: .*wings"):
        load_flow(tmp_path)
    write_json(tmp_path / "config.json", [])
    with pytest.raises(ValueError, match="does not describe a flow"):
        load_flow(tmp_path)
    save_flow(small_flow(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_flow(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.safetensors"):
        load_flow(tmp_path)


# ---- the terminal ----


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, with a bar and without."""
    code = """
import sys, torch, pycnf.training
assert "lightning" not in sys.modules and "tensorboardX" not in sys.modules
from pycnf.flow import CNF
x = torch.randn(64, 2)
for progress in (False, "my run"):
    print("begin", progress, file=sys.stderr)
    pycnf.training.fit(CNF(2, hidden=(4,)), x, x, max_steps=4, batch_size=32, device="cpu", progress=progress)
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("cwd"),
        env=os.environ | {"PYTHONPATH": str(Path(records.__file__).parents[1])},
    )


def test_training_is_silent_but_for_its_bar(terminal: subprocess.CompletedProcess[str]) -> None:
    assert terminal.returncode == 0, terminal.stderr
    assert terminal.stdout == ""
    silent, shown = terminal.stderr.split("begin my run\n")
    assert silent == "begin False\n"
    assert "my run: 100%" in shown
    for word in ("4/4", "loss", "nfe", "backward", "held-out nll"):
        assert word in shown
