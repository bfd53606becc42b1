"""Measure an encoder from Python: `python examples/evaluate_from_python.py ENCODER DATASET`.

ENCODER is a directory or a Hugging Face name, DATASET anything that `mlflow-dr datasets` lists.
"""

import sys

import mlflow_dr

encoder, dataset = sys.argv[1:]
report = mlflow_dr.evaluate(encoder, dataset, measures="ndcg@10 recall@100")
for measure, value in report.measures.items():
    print(f"{measure}: {value:.4f}")
worst = report.frame()["ndcg@10"].idxmin()
print(f"the worst query is {worst}; it found {report.ranking[worst][:3]}")
