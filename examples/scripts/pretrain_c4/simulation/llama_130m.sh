#!/bin/sh
# LLaMA-130M on C4 with Q-GaLore simulated: float weights on an INT8 grid, full gradients, INT4 projector.
# TOKENIZER names a folder with a tokenizer of at most 32000 entries, PROCESSES how many there are on this machine
# (default 1); further flags go behind the script.
cd "$(dirname "$0")/../../.." || exit 1
exec torchrun --standalone --nproc_per_node "${PROCESSES:-1}" run_pretrain.py \
    --model_config configs/llama_130m.json --data c4 --tokenizer "${TOKENIZER:?is not set}" --simulation \
    --optimizer q_galore_adamw8bit --weight_quant --stochastic_round --proj_quant \
    --rank 256 --update_proj_gap 200 --galore_scale 0.25 --lr 0.015 --weight_decay 0 \
    --batch_size 256 --total_batch_size 512 --dtype bfloat16 \
    --num_training_steps 20000 --warmup_steps 2000 --eval_every 1000 --name q-galore-simulation-llama-130m "$@"
