"""`mlflow-dr validate`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, find_project_run, takes
from mlflow_dr.validation.config import ValidateConfig


@click.command("validate", cls=TakesSeveral)
@takes(ValidateConfig, has_file=True)
def validate_command(config: ValidateConfig) -> int:
    """Validate each checkpoint of a run, an experiment or a directory, now and as they come.

    Collection, split and lengths come from the run and its checkpoints. Start any number of
    validators, on any machines, before, during or after the training, and stop and restart them
    at any time: each takes checkpoints that no other one is working on.

    A --config file may have several validations by name, under the key `validations`.

    The exit code is 1 when a checkpoint is FAILED (no encoder can be read from its files, or it
    took longer than --max-seconds), or when some could not be fetched or read on this machine and
    are left to other validators.

    \b
    Example:
        mlflow-dr validate --run-id 0123456789abcdef0123456789abcdef
        mlflow-dr validate --experiment msmarco --order bisect --config validations.yaml
        mlflow-dr validate --checkpoints-dir output --dataset path/to/beir
        mlflow-dr validate --ckpts_dir output --candidate_dir corpus --query_files dev.json \\
            --qrel_file qrels.tsv --metrics RR@10 nDCG@10
    """
    config.check_source()  # before seconds of imports
    from mlflow_dr.tracking.client import limit_mlflow_retries
    from mlflow_dr.tracking.status import curves_hint
    from mlflow_dr.validation.validate import validate

    project = find_project_run(config.tracking_uri)
    limit_mlflow_retries()
    followed, counts = validate(config)
    is_project = project and followed.run and followed.run.id == project.id
    if followed.run is not None and not is_project:
        click.echo(curves_hint(followed.run), err=True)
    if project is not None and not is_project:
        text = f"validated {counts.done} checkpoints of {followed.name}; {counts.failed} failed\n"
        project.log_report({}, {"validated.txt": text})
    return 0 if counts.are_good else 1
