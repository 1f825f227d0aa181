. /work/scratch/env.sh; export PYTHONPATH=/work/scratch
R() { /work/main/.venv/bin/python /work/scratch/local.py "$@" > /work/scratch/q_$2.txt 2>&1; }
R marketplace w5 cqsid std K.w=0.5 FAST=1
R marketplace rqbig rqvae std 'quantizer.level_sizes=[256,12,12]' FAST=1
