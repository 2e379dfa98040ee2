#!/bin/bash
# One launcher a node, FSDP2 over all of them:  sbatch --nodes 4 recipes/accelerate/slurm.sh --config recipes/configs/qwen3-0.6b.yaml
# The folder of the run (--out) must be one that all nodes share. Two minutes before the job's end it saves and stops; the same
# command goes on from there.
#SBATCH --job-name=symlm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
set -euo pipefail
export MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'accelerate launch --config_file recipes/accelerate/nodes.yaml \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port 29500 \
  recipes/pretrain.py --resume=auto "$@"' launch "$@"
