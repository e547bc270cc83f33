"""QLoRA with the drop-in names and a plain torch loop.

python examples/qlora_sft.py [MODEL ROWS.jsonl [OUTPUT]]
"""

import sys

import torch

from purelm import FastLanguageModel, embedded
from purelm.row_files import read_rows
from purelm.rows import collate, encode


def main(name: str, data: str, output: str = "qlora-out", steps: int = 60, batch: int = 16):
    model, tokenizer = FastLanguageModel.from_pretrained(
        name,
        max_seq_length=512,
        dtype=None if torch.cuda.is_available() else torch.float32,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=3407)
    model.print_trainable_parameters()

    # Only the assistant's words are learned: the other labels are -100.
    raw = read_rows(data)
    rows = encode(raw, tokenizer, max_length=512).rows
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(rows), (batch,), generator=generator).tolist()
        loss = model(**collate([rows[i] for i in chosen], pad_id=tokenizer.pad_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {losses[-1]:.3f}")

    FastLanguageModel.for_inference(model)
    question = raw[0].value["messages"][:1]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=32)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))

    model.save_pretrained(f"{output}/adapter")  # peft's format
    model.save_pretrained_merged(f"{output}/merged", tokenizer)  # a whole 16-bit model
    return losses[0], losses[-1]


if __name__ == "__main__":
    main(*(sys.argv[1:] or (embedded.MODEL, str(embedded.train_rows()))))
