"""Fine-tunes a model: flags -> config -> run. `python train.py --help` lists every flag.

python train.py                                          # the main job: SmolLM2-135M on SocialIQA
python train.py --config configs/commonsense_smollm2.py --output runs/commonsense
"""

from __future__ import annotations

import sys

from nalora_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
