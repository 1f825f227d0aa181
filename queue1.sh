. /work/scratch/env.sh; export PYTHONPATH=/work/scratch
R() { /work/main/.venv/bin/python /work/scratch/local.py "$@" > /work/scratch/q_$2.txt 2>&1; }
R marketplace qc cqsid std K.qc=1 FAST=1
R marketplace long cqsid std quantizer.steps=1800 FAST=1
