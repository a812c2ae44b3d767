"""What a running sweep shows: the best within its bounds, rates, what the budget has left."""

import io
import json

from rich.console import Console

from conf.load import parse
from conf.sweep_schema import SweepConfig
from sweeps.planning.plans import plan_points
from sweeps.reports.live import Display
from sweeps.stores.store import Store
from sweeps.stores.studies import enqueue, make_study
from sweeps.trials.claims import claim, finish, prune


def test_table_has_best_rates_budget_and_states(tmp_path):
    (tmp_path / "base.yaml").write_text("{}")
    space = {"model.d_state": [8, 16, 32, 64, 128]}
    settings = {
        "train.base": str(tmp_path / "base.yaml"),
        "train.space": space,
        "train.budget.tokens": 1000.0,
    }
    store = Store(tmp_path, parse(SweepConfig, [{"name": "t", **settings}]))
    study = make_study(store, "train", {"loss": "maximize"}, stage="train")
    enqueue(study, plan_points([{"model.d_state": n} for n in space["model.d_state"]], [0]))
    output = io.StringIO()
    console = Console(file=output, width=200, force_terminal=True, color_system=None)
    with Display(console, store, "train", [study]) as display:
        display._started -= 60
        for value, excess in ((0.5, -1.0), (0.9, 2.0)):
            taken = claim(store, [study])
            assert taken is not None
            taken.trial.set_user_attr("tokens", 300.0)
            finish(taken, {"loss": value}, 3.0, {}, {"peak_memory_mib <= 10": excess})
            taken.lock.release()
        taken = claim(store, [study])
        assert taken is not None
        prune(taken, 1.0)
        taken.lock.release()
        running = claim(store, [study])
        assert running is not None
        running.run_dir.mkdir(parents=True)
        (running.run_dir / "config.yaml").write_text("trainer: {max_steps: 40}\n")
        metrics = {"train/loss": 1.5, "train/tokens_per_second": 2500.0}
        line = json.dumps({"step": 10, "metrics": metrics})
        (running.run_dir / "metrics.jsonl").write_text(line + "\n")
        display.update()
        running.lock.release()
    shown = " ".join(output.getvalue().split())  # a title wraps
    assert "2/5 done, 1 pruned, best 0.500 (train/0000), 1m00s, 1" in shown
    assert " trials/h, 2,500 tokens/s, " in shown
    assert "60% of the tokens, about " in shown
    assert "0.900 (breaks peak_memory_mib <= 10)" in shown
    assert "step 10/40, loss 1.500" in shown
