"""Tevatron's documented commands of encoding and search, with `mlflow-dr` in front."""

import json
import shlex
from pathlib import Path

import pytest
import pytrec_eval
from forks import Forks

from mlflow_dr.collection.qrels import read_qrels

VERSION_1 = """
mlflow-dr encode --output_dir=temp --model_name_or_path model_nq --per_device_eval_batch_size 156 \
    --p_max_len 64 --dataset_name data/nq --encoded_save_path corpus_emb_00.pkl \
    --encode_num_shard 2 --encode_shard_index 00
mlflow-dr encode --output_dir=temp --model_name_or_path model_nq --per_device_eval_batch_size 156 \
    --p_max_len 64 --dataset_name data/nq --encoded_save_path corpus_emb_01.pkl \
    --encode_num_shard 2 --encode_shard_index 01
mlflow-dr encode --output_dir=temp --model_name_or_path model_nq --per_device_eval_batch_size 156 \
    --dataset_name data/nq/dev --encoded_save_path query.pkl --q_max_len 32 --encode_is_qry
mlflow-dr search --query_reps query.pkl --passage_reps corpus_emb*.pkl --depth 100 \
    --batch_size -1 --save_text --save_ranking_to rank.txt
mlflow-dr search --query_reps query.pkl --passage_reps corpus_emb_00.pkl --depth 100 \
    --save_ranking_to intermediate/00
mlflow-dr search --query_reps query.pkl --passage_reps corpus_emb_01.pkl --depth 100 \
    --save_ranking_to intermediate/01
mlflow-dr search --score_dir intermediate --query query.pkl --depth 100 --save_ranking_to merged.txt
mlflow-dr convert --input rank.txt --output rank.trec
"""
VERSION_3 = """
mlflow-dr encode --output_dir temp --model_name_or_path model_nq --per_device_eval_batch_size 156 \
    --passage_max_len 64 --dataset_name data/nq --encode_output_path corpus_emb_00.pkl \
    --dataset_number_of_shards 2 --dataset_shard_index 0
mlflow-dr encode --output_dir temp --model_name_or_path model_nq --per_device_eval_batch_size 156 \
    --passage_max_len 64 --dataset_name data/nq --encode_output_path corpus_emb_01.pkl \
    --dataset_number_of_shards 2 --dataset_shard_index 1
mlflow-dr encode --output_dir temp --model_name_or_path model_nq --per_device_eval_batch_size 156 \
    --dataset_name data/nq --dataset_split dev --encode_output_path query.pkl --query_max_len 32 \
    --encode_is_query
mlflow-dr search --query_reps query.pkl --passage_reps corpus_emb*.pkl --depth 100 \
    --batch_size -1 --save_text --save_ranking_to rank.txt
mlflow-dr search --query_reps query.pkl --passage_reps corpus_emb_00.pkl --depth 100 --save_text \
    --save_ranking_to intermediate/00.txt
mlflow-dr search --query_reps query.pkl --passage_reps corpus_emb_01.pkl --depth 100 --save_text \
    --save_ranking_to intermediate/01.txt
mlflow-dr search --results_dir intermediate --output merged.txt --depth 100
mlflow-dr convert --input rank.txt --output rank.trec
"""


@pytest.mark.parametrize("commands", [VERSION_1, VERSION_3], ids=["v1", "v3"])
def test_the_documented_commands_give_trec_evals_values(
    commands: str, forks: Forks, collection: Path, tiny_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "model_nq").symlink_to(tiny_directory)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nq").symlink_to(collection)
    (tmp_path / "intermediate").mkdir()
    lines = [
        *commands.strip().splitlines(),
        "mlflow-dr evaluate model_nq --dataset data/nq --split dev --depth 100 --ranking own.trec "
        "--measures 'mrr@10 ndcg@10 recall@100' --keep-own-id --output own.json",
    ]
    for line in lines:
        argv = shlex.split(line)[1:]
        argv += ["--dtype", "fp32"] if argv[0] in ("encode", "evaluate") else []
        done = forks.call("mlflow-dr", *argv, variables={}, directory=tmp_path, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    def columns(name: str) -> list[list[str]]:
        return [text.split() for text in (tmp_path / name).read_text().splitlines()]

    ranked = columns("rank.txt")
    assert columns("merged.txt") == ranked
    assert [[line[0], line[2], line[4]] for line in columns("own.trec")] == ranked
    trec = columns("rank.trec")
    assert [[line[0], line[2], line[4]] for line in trec] == ranked

    run: dict[str, dict[str, float]] = {}
    for query, _, passage, _, score, _ in trec:
        run.setdefault(query, {})[passage] = float(score)
    qrels = read_qrels(collection / "qrels" / "dev.tsv")
    values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recall_100"}).evaluate(run)
    own = json.loads((tmp_path / "own.json").read_text())["measures"]
    for name, ours in (("ndcg_cut_10", "ndcg@10"), ("recall_100", "recall@100")):
        mean = sum(value[name] for value in values.values()) / len(qrels)
        assert own[ours] == pytest.approx(mean)
