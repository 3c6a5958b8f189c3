#!/bin/sh
# RoBERTa on MRPC and CoLA with GaLore, for each format of the projector: float32, 8 bits with one scale, 8 bits in
# blocks, 4 bits in blocks. One table a task, OUTPUT/mrpc/results.md and OUTPUT/cola/results.md; finished runs are not
# repeated. GLUE names a folder with GLUE's files (default: the hub), SEEDS the runs of a row; further flags go behind
# the script.
cd "$(dirname "$0")/../.." || exit 1
OUTPUT=${OUTPUT:-results/proj_quantize_glue}
for task in mrpc cola; do
    case $task in
        mrpc) batch=16 ;;
        cola) batch=32 ;;
    esac
    for type in none 8bit 8bit_blockwise 4bit; do
        # shellcheck disable=SC2086  # several seeds are several words
        "${PYTHON:-python}" run_glue.py \
            --model_name_or_path "${MODEL:-roberta-base}" --task_name "$task" ${GLUE:+--data_dir "$GLUE"} \
            --enable_galore --lora_all_modules --proj_quantize_type "$type" \
            --lora_r 4 --galore_scale 4 --update_proj_gap 500 --max_length 512 \
            --per_device_train_batch_size "$batch" --learning_rate 3e-5 --num_train_epochs 30 \
            --seeds ${SEEDS:-0 1 2} --output_dir "$OUTPUT/$task" --no_save_model "$@" || exit $?
    done
done
