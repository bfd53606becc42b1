"""Kinds of malformed inputs and their right values, for `benchmarks/fuzz.py`."""

from __future__ import annotations

from benchmarks.fuzzing.case import Kind


def all_kinds() -> list[Kind]:
    """All kinds; their modules are imported only in the process that runs the cases."""
    from benchmarks.fuzzing import (
        caches,
        checkpoints,
        collections,
        commands,
        encoders,
        examples,
        option_values,
        plans,
        rankings,
        training_flags,
        validators,
        vectors,
    )

    return [
        *collections.KINDS,
        *examples.KINDS,
        *rankings.KINDS,
        *vectors.KINDS,
        *caches.KINDS,
        *encoders.KINDS,
        *checkpoints.KINDS,
        *validators.KINDS,
        *option_values.KINDS,
        *commands.KINDS,
        *plans.KINDS,
        *training_flags.KINDS,
    ]
