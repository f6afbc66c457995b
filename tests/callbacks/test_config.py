"""The callback and logger groups name things that exist, with settings that they have."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted([*CONF.glob("callbacks/*.yaml"), *CONF.glob("logger/*.yaml")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_node_names_a_class_and_only_settings_it_has(file):
    for node in OmegaConf.to_container(OmegaConf.load(file), resolve=False).values():
        signature = inspect.signature(get_object(node.pop("_target_")))
        signature.bind(**node)


def test_the_logger_group_has_the_choices_that_are_documented():
    assert {file.stem for file in CONF.glob("logger/*.yaml")} >= {
        "tensorboard",
        "csv",
        "wandb",
        "mlflow",
        "none",
    }


def test_the_csv_logger_writes_beside_our_own_table_and_not_over_it(tmp_path):
    node = OmegaConf.to_container(OmegaConf.load(CONF / "logger" / "csv.yaml"), resolve=False)["csv"]
    make = get_object(node.pop("_target_"))
    for start in (0, 1):  # one that goes on in the same folder keeps what the first wrote
        logger = make(**{**node, "save_dir": str(tmp_path)})
        logger.log_metrics({"reward/mean": 0.5 + start}, step=start)
        logger.save()
    tables = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("metrics.csv")}
    assert tables == {f"csv/version_{n}/metrics.csv": f"reward/mean,step\n{0.5 + n},{n}\n" for n in (0, 1)}
