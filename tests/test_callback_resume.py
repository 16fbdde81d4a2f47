"""Promise: a watched run that is killed and goes on is the run that was not: weights bit for bit, log and windows."""

import contextlib
import json

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_clars.per_sample import NormMonitor, PerSampleLog, PerSampleNormsCallback
from hf_clars.per_sample.callback import KEPT
from hf_clars.per_sample.log import FOLDER
from tests.test_resume_open_shapes import LENGTHS, Texts, llama
from tests.trainer_kit import plain_args

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}


class Fewer(Texts):
    """The last batch of an epoch has two texts, and a shape that is open with them too."""

    def __len__(self):
        return super().__len__() - 2


class Stream(IterableDataset):
    def __iter__(self):
        texts = Texts()
        return (texts[i] for i in range(4 * len(LENGTHS)))


class Killed(TrainerCallback):
    """Stops the run in a step, after its samples have been measured."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_in(folder, *others, every=1, data=Texts, **settings):
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.5, "optim": "sgd", **SAVED, **settings}
    callbacks = [PerSampleNormsCallback(every=every, top_k=2, strict=True), *others]
    return Trainer(llama(), plain_args(folder, **settings), train_dataset=data(), callbacks=callbacks)


def same(found, expected, folder, other):
    weights = expected.model.state_dict()
    assert [n for n, w in found.model.state_dict().items() if not torch.equal(w, weights[n])] == []
    log, whole = PerSampleLog.open(folder).read(), PerSampleLog.open(other).read()
    for name, values in whole.items():
        torch.testing.assert_close(log[name], values, rtol=1e-6, atol=1e-9, equal_nan=True)
    windows = [
        [json.loads(x) for x in (f / FOLDER / "windows.jsonl").read_text().split("\n")[:-1]] for f in (folder, other)
    ]
    assert [entry.keys() for entry in found.state.log_history] == [e.keys() for e in expected.state.log_history]
    assert [w["step"] for w in windows[0]] == [w["step"] for w in windows[1]]
    for left, right in zip(*windows, strict=True):
        for a, b in zip(left["hardest"], right["hardest"], strict=True):
            assert a == pytest.approx(b, rel=1e-6)


CASES = {
    "each step is measured": {},
    "each second step": {"every": 2, "logging_steps": 3, "max_steps": 6},
    "accumulation, and a last batch that is smaller": {"data": Fewer, "gradient_accumulation_steps": 2},
    "checkpoints within epochs": {"data": Fewer, "save_steps": 4, "max_steps": 8},
    "accumulation that does not divide the epoch": {"gradient_accumulation_steps": 4, "save_steps": 1},
    "checkpoints after epochs": {"save_strategy": "epoch", "max_steps": 8},
    "a stream": {"data": Stream},
}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_as_the_run_that_went_on(tmp_path, case):
    whole, folder = trainer_in(tmp_path / "whole", **CASES[case]), tmp_path / "killed"
    whole.train()
    saved = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "whole").glob("checkpoint-*"))
    with contextlib.suppress(KeyboardInterrupt):
        trainer_in(folder, Killed(saved[0] + 1), **CASES[case]).train()
    resumed = trainer_in(folder, **CASES[case])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step > saved[0] + 1
    same(resumed, whole, folder, tmp_path / "whole")


def test_what_was_proven_is_handed_on_by_a_run_that_is_killed_again_before_it_measures(tmp_path):
    settings, folder = {"every": 4, "save_steps": 1}, tmp_path / "killed"
    whole = trainer_in(tmp_path / "whole", **settings)
    whole.train()
    for step in (1, 2):
        with contextlib.suppress(KeyboardInterrupt):
            trainer_in(folder, Killed(step), **settings).train(resume_from_checkpoint=step > 1)
    resumed = trainer_in(folder, **settings)
    resumed.train(resume_from_checkpoint=True)
    same(resumed, whole, folder, tmp_path / "whole")


def test_a_checkpoint_from_before_this_was_kept_is_resumed_as_ever(tmp_path):
    whole = trainer_in(tmp_path)
    whole.train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"][KEPT]
    path.write_text(json.dumps(state))
    resumed = trainer_in(tmp_path)
    resumed.train(resume_from_checkpoint=str(path.parent))
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, whole.model.state_dict()[name])
    kept = [json.loads((tmp_path / f"checkpoint-{n}" / "trainer_state.json").read_text()) for n in (2, 4)]
    assert [KEPT in state["stateful_callbacks"] for state in kept] == [False, True]


def test_a_loop_of_one_s_own_hands_it_on_itself():
    def run(steps, model=None, proven=None, first=0):
        model = llama() if model is None else model
        with NormMonitor(model, every=1, strict=True, first_step=first, proven=proven) as monitor:
            for step in range(first, steps):
                ids = torch.stack([Texts()[4 * step + i]["input_ids"] for i in range(4)])
                model.zero_grad()
                with monitor.batch():
                    model(input_ids=ids, labels=ids)["loss"].backward()
                with torch.no_grad():
                    for param in model.parameters():
                        param -= 0.5 * param.grad
            return model, json.loads(json.dumps(monitor.proven_calls()))

    whole, _ = run(6)
    resumed, _ = run(6, *run(3), first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
