"""The checkpoints of a run: what is chosen, the previous good one where one is damaged, what is pruned."""

from __future__ import annotations

import pytest
from test_checkpoint import save

import atomic
from training import shelf
from training.checkpoint import FILES, MANIFEST, MODEL


def test_pruning_keeps_the_newest_the_best_and_the_newest_scheduled(tmp_path):
    for step, loss, scheduled in [(1, 3.0, True), (2, 1.0, True), (3, 2.0, True), (4, None, False), (5, 2.5, False)]:
        save(tmp_path, step, loss, scheduled)
    (tmp_path / f"{atomic.PARTIAL}step_00000006-x").mkdir()
    shelf.prune(tmp_path, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003", "step_00000005"]
    chosen = {which: shelf.choose(tmp_path, which, shelf.whole, pytest.fail).step for which in shelf.ORDERS}
    assert chosen == {"best": 2, "last": 5, "scheduled": 3}


def test_without_evaluations_the_newest_is_the_best(tmp_path):
    assert shelf.choose(tmp_path, "best", shelf.whole, pytest.fail) is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert shelf.choose(tmp_path, "best", shelf.whole, pytest.fail).step == 2


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / f"{atomic.PARTIAL}step_00000002-abc")
    assert [one.step for one in shelf.find(tmp_path)] == [1]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "gone", "empty"])
def test_the_previous_good_one_is_used_with_one_warning_that_names_what_is_damaged(tmp_path, name, harm):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    middle = len(content) // 2
    if (name, harm) == (MANIFEST, "grow"):
        pytest.skip("white space is no part of what JSON says")
    path.write_bytes({"flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:], "cut": content[:-1],
                      "grow": content + b" ", "gone": b"", "empty": b""}[harm])
    if harm == "gone":
        path.unlink()
    warnings = []
    assert shelf.choose(tmp_path, "last", shelf.whole, warnings.append, set_aside=True).step == 1
    (warning,) = warnings
    assert str(path) in warning and "using step_00000001 instead" in warning
    assert sorted(one.name for one in tmp_path.iterdir()) == ["damaged-step_00000002", "step_00000001"]
    shelf.prune(tmp_path, keep_last=1)
    assert (tmp_path / "damaged-step_00000002").is_dir()


def test_when_nothing_is_whole_the_sentence_says_so_and_nothing_is_moved(tmp_path):
    (save(tmp_path, 1) / MODEL).write_bytes(b"")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole: .*model.safetensors .*restart=true"):
        shelf.choose(tmp_path, "last", shelf.whole, pytest.fail, set_aside=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
