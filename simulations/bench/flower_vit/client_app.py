"""The peer's ClientApp: for each message it builds the model, loads the adapter, trains one epoch and sends it back."""

from __future__ import annotations

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_vit.task import SMALL, get_model, load_data, peft, train as train_one_epoch

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round on this client's share."""
    torch.set_num_threads(1)
    settings = context.run_config
    model = get_model(**SMALL)
    peft().set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    loader = load_data(settings["root"], int(context.node_config["partition-id"]), settings["images"], settings["batch"])
    began = time.monotonic()
    loss = train_one_epoch(model, loader, settings["rate"])
    seconds = time.monotonic() - began
    metrics = MetricRecord({"loss": loss, "seconds": seconds, "num-examples": len(loader.dataset)})
    state = peft().get_peft_model_state_dict(model)
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)
