"""Measure an encoder from Python: `python examples/evaluate_from_python.py ENCODER DATASET`.

ENCODER is a directory or a Hugging Face name, DATASET anything that `mlflow-dr datasets` lists.
"""

import sys

from mlflow_dr import EvaluateConfig, evaluate_encoder

encoder, dataset = sys.argv[1:]
config = EvaluateConfig(encoder=encoder, dataset=dataset, measures="ndcg@10 recall@100")
report = evaluate_encoder(config)
for measure, value in report.measures.items():
    print(f"{measure}: {value:.4f}")
worst = min(report.per_query, key=lambda query: report.per_query[query]["ndcg@10"])
print(f"the worst query is {worst}; it found {report.ranking[worst][:3]}")
