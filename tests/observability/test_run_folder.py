import pytest

from flux_ray.config import PolicyGradientConfig
from flux_ray.errors import UserError
from flux_ray.observability.run_folder import EVAL, METRICS, REFERENCE, RunFolder, read_lines

pytestmark = pytest.mark.unit

TORN = '{"step": 2, "reward/me'


@pytest.mark.parametrize(("name", "steps"), [(METRICS, [0]), (EVAL, [0, 1])])
def test_a_resumed_run_drops_a_torn_last_line_and_goes_on(tmp_path, name, steps):
    folder = RunFolder(tmp_path)
    for step in range(2):
        folder.append(name, {"step": step, "loss": 0.1 + 0.2})
    with (tmp_path / name).open("a") as file:
        file.write(TORN)
    assert [line["step"] for line in read_lines(tmp_path / name)] == [0, 1]
    folder.create(PolicyGradientConfig(resume=str(tmp_path)), resume_step=1)
    folder.append(name, {"step": 7, "loss": 0.1 + 0.2})
    assert read_lines(tmp_path / name) == [{"step": step, "loss": 0.1 + 0.2} for step in [*steps, 7]]


def test_a_line_broken_elsewhere_is_named(tmp_path):
    file = tmp_path / METRICS
    file.write_text(f'{{"step": 0}}\n{TORN}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: broken JSON") as error:
        RunFolder(tmp_path).create(PolicyGradientConfig(resume=str(tmp_path)), resume_step=4)
    assert "\n" not in str(error.value)
    assert file.read_text().endswith('{"step": 3}\n')  # nothing is lost


@pytest.mark.parametrize("resume_step", [None, 1])
def test_nothing_is_added_to_a_torn_line_of_kept_log_probs(tmp_path, resume_step):
    folder = RunFolder(tmp_path)
    kept = [{"pair": "a", "chosen": -1.5, "rejected": -2.0}, {"pair": "b", "chosen": -0.1, "rejected": -3.0}]
    folder.append(REFERENCE, kept[0])
    with (tmp_path / REFERENCE).open("a") as file:
        file.write('{"pair": "c", "cho')
    folder.create(PolicyGradientConfig(), resume_step=resume_step)
    folder.append(REFERENCE, kept[1])
    assert read_lines(tmp_path / REFERENCE) == kept


def test_what_an_evaluation_gave(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.evaluated(0) is None
    folder.append(EVAL, {"step": 2, "eval/task_mean": 0.5, "eval/odd": float("nan"), "answers": [{"reward": 1.0}]})
    assert folder.evaluated(2) == {"eval/task_mean": 0.5} and folder.evaluated(1) is None


def test_a_run_that_starts_from_another_s_checkpoint_takes_no_folder_in_use(tmp_path):
    """Else the checkpoints of the first try would count as the newest of the second."""
    config = PolicyGradientConfig(resume=str(tmp_path / "first" / "checkpoints" / "step-000002"))
    fork = RunFolder(tmp_path / "fork")
    fork.create(config, resume_step=2)
    fork.metrics(2, {"loss": 0.1})
    with pytest.raises(UserError, match="fork holds a run already"):
        fork.create(config, resume_step=2)
    RunFolder(tmp_path / "first").create(config, resume_step=2)
