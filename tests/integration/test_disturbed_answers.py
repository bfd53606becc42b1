"""Validators behind a proxy that cuts, loses and falsifies answers of a real server."""

from collections.abc import Callable

from mlflow import MlflowClient

from benchmarks.faulting.proxy import Fault, Proxy

# late answers take their time; an empty one MLflow itself takes for the answer to a write
EVERY_WAY = set(Fault) - {Fault.DELAYED, Fault.EMPTY}


def test_each_checkpoint_has_the_points_that_it_has_without_the_proxy(
    forked: Callable, publish_noise: Callable, points: Callable, server: str, client: MlflowClient
) -> None:
    steps = [1, 2, 3, 4]
    run_id = publish_noise(*steps)
    with Proxy(server, 0.15, EVERY_WAY) as proxy:
        ended = forked(
            *("validate", "--run-id", run_id, "--poll-seconds", 0.1),
            times=2,
            MLFLOW_TRACKING_URI=proxy.uri,
            MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR="0",
        )
    assert proxy.faults.total() > len(EVERY_WAY)
    assert ended.codes == [0, 0], ended.printed
    assert forked("validate", "--run-id", run_id, "--name", "calm", "--once").code == 0
    disturbed, calm = points(client, run_id, "val"), points(client, run_id, "calm")
    assert all(len(values) == 1 for by_step in disturbed.values() for values in by_step.values())
    for measure in ("mrr_at_10", "ndcg_at_10"):
        assert disturbed[measure] == calm[measure], ended.printed
        assert sorted(disturbed[measure]) == steps
