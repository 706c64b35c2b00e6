"`osnb bench train`: it runs to the end, shares add up, what does not fit is tried with less or is a row. No figure about speed is tested."
import copy, json, subprocess, sys
from dataclasses import asdict
from pathlib import Path

import pytest, torch

from opensora_nb.mmdit.bench import build
from opensora_nb.training.bench import KEEPINGS, Keeping, ShareOfAdam, TrainBench, bench_cards, bench_case, card_line, kept, quick, report, speed_up, step_parts, tiny_cases, train_cases
from opensora_nb.training.plan import TABLE45
ROOT = Path(__file__).parents[1]

def test_the_rows_are_those_of_the_tables_and_the_aims_those_of_four():
    cases = train_cases()
    assert [round(8 * c.reported, 6) for c in cases if c.reported] == [x for rates in TABLE45.values() for x in rates]
    assert {c.name: c.aim for c in cases if c.aim} == {"256 px, 33 frames": 4.0, "256 px, 129 frames": 1.0, "768 px, 33 frames": 0.25, "768 px, 129 frames": 0.027}
    assert all(c.model.depth == 19 and c.model.depth_single_blocks == 38 and c.model.hidden_size == 3072 for c in cases), "full width and depth"

def test_one_rank_is_adamw_and_of_eight_one_moves_an_eighth():
    torch.manual_seed(0)
    one = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(8)))
    whole, shared, plain = copy.deepcopy(one), copy.deepcopy(one), copy.deepcopy(one)
    optimizers, adam = [ShareOfAdam(whole, 1, 0.1), ShareOfAdam(shared, 8, 0.1)], torch.optim.AdamW(plain.parameters(), 0.1)
    for _ in range(3):
        for model, optimizer in zip((whole, shared), optimizers): model(torch.ones(2, 8)).square().sum().backward(); optimizer.step()
        adam.zero_grad(); plain(torch.ones(2, 8)).square().sum().backward(); torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0); adam.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.parameters(), plain.parameters()))
    moved = [not torch.equal(a, b) for a, b in zip(shared.parameters(), one.parameters())]
    assert moved == [True, True] + [False] * 14 and all(p.grad is not None and not p.grad.any() for p in shared.parameters()), "gradients stay, and are zero"

def test_what_does_not_fit_is_tried_with_less_and_another_error_is_a_row():
    case = tiny_cases()[1]
    model = build(case.model).train()
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    optimizer, problems = ShareOfAdam(model), [torch.OutOfMemoryError("full"), torch.OutOfMemoryError("full")]
    def hook(*_):
        if problems: raise problems.pop()
    model.register_forward_pre_hook(hook)
    row = bench_case(model, optimizer, case, None, 1, torch.device("cpu"), 1e12, KEEPINGS, say=lambda line: None)
    assert row["keeping"] == KEEPINGS[2].name and len(row["tried"]) == 2 and row["mfu"] == pytest.approx(row["operations_1e12"] / row["seconds"])
    problems += [ValueError("another")]
    row = bench_case(model, optimizer, case, None, 1, torch.device("cpu"), None, KEEPINGS, say=lambda line: None)
    assert "another" in row["missing"] and "another" in card_line(row)
    assert not any("forward" in vars(b) for b in (*model.double_blocks, *model.single_blocks)), "as before"

def test_offloaded_tensors_are_counted_and_blocks_are_as_before():
    model = build(tiny_cases()[1].model)
    with kept(model, Keeping("x", 99, 99, offload=True)) as aside: assert aside is not None and all("forward" in vars(b) for b in model.single_blocks)
    with kept(model, Keeping("x")) as aside: assert aside is None and not any("forward" in vars(b) for b in (*model.double_blocks, *model.single_blocks))

@pytest.mark.slow
@pytest.mark.soak
def test_the_quick_suite_runs_from_the_command_line(tmp_path):
    r = subprocess.run([sys.executable, "-m", "opensora_nb.commands.cli", "bench", "train", "--quick", "--device", "cpu", "--workers", "1", "--out", tmp_path / "figures.json"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    check_schema(result)
    assert report(result) in r.stdout and str(tmp_path) not in json.dumps({k: v for k, v in result.items() if k != "command"})

def check_schema(result):
    assert result["suite"] == "train" and result["machine"]["cpu"] and "torch" in result["machine"]["versions"]
    for r in result["steps"]:
        assert 0.5 < sum(r["share"].values()) <= 1.02 and r["outside"] == pytest.approx(1 - sum(r["share"].get(k, 0) for k in ("forward", "backward", "optimizer")))
        assert r["seconds"] > 0 and r["saving"] > 0
    assert [r["source"] for r in result["steps"]] == ["cached latents", "video files"] and len(result["keeping"]) == len(KEEPINGS)
    for r in result["batches"]["rows"]:
        for side in ("given", "searched"): assert (r[side]["samples_per_s"] is None) == (r[side]["problem"] is not None)
        assert r["searched"]["memory_mb"] is None or r["searched"]["memory_mb"] <= result["batches"]["memory_mb"]
    assert "missing" in result["gpu"] or result["gpu"]["rows"]

def test_the_record_that_the_page_shows_is_whole_and_says_where_it_was_made():
    result = json.loads((ROOT / "assets/bench/train.json").read_text())
    check_schema(result)
    assert result["command"].startswith("osnb bench train") and "--quick" not in result["command"] and "load_average" in result["machine"]
    assert "outside forward, backward and optimizer" in report(result)
