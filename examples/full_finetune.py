"""Every weight trained, nothing quantized: the run that `purelm sft --full` makes, as one call.

python examples/full_finetune.py [MODEL ROWS.jsonl [OUTPUT]]
"""

import sys

from purelm import embedded, sft
from purelm.sft_options import Options


def main(model: str, data: str, output: str = "full-out", steps: int = 60) -> sft.Result:
    return sft.run(
        Options(
            model=model,
            data=data,
            output=output,
            precision="full",
            batch_size=16,
            accumulation=1,
            learning_rate=5e-4,
            max_steps=steps,
            eval_fraction=0.1,
            recompute=False,
        )
    )


if __name__ == "__main__":
    main(*(sys.argv[1:] or (embedded.MODEL, str(embedded.train_rows()))))
