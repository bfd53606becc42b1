#!/bin/sh
# The experiments of "Moving Stuff Around" (Câmara and Hauff, ReNeuIR 2022), measured by `mlflow-dr loaders`: a
# cross-encoder that takes 8 documents of 512 tokens a step and device.
#
#     sh examples/moving_stuff_around.sh                               # 8 GPUs, MS MARCO's documents
#     SMALL=1 sh examples/moving_stuff_around.sh --passages 20000      # any machine, no download
#
# Further arguments go to each of the studies.
set -eu

study() {
    if [ -n "${SMALL:-}" ]; then
        mlflow-dr loaders --ranker cross --batch-size 8 --dataset demo --model tiny --max-length 128 "$@"
    else
        mlflow-dr loaders --ranker cross --batch-size 8 --dataset irds:msmarco-document/train \
            --model distilbert-base-uncased --max-length 512 --device cuda --backend nccl "$@"
    fi
}

if [ -n "${SMALL:-}" ]; then
    ranks="1 2" some="1" workers="0 1 2"
else
    ranks="1 2 4 8" some="4" workers="0 1 2 4 8"
fi

# three ways to hold the documents, on more and more devices
study --run-name devices --store memory lookup ir_datasets --ranks $ranks "$@"

# more workers, pinned memory and a RAM disk, as the paper tried them with ir_datasets
study --run-name workers --store ir_datasets --ranks $some --workers $workers "$@"
[ -n "${SMALL:-}" ] || study --run-name pinned --store ir_datasets --ranks $some --pin-memory no yes "$@"
study --run-name ramdisk --store ir_datasets --ranks $some --ramdisk no yes "$@"
