"""The peer: this project's work as a Flower app is usually written, on timm, peft, torchvision and stock FedAvg."""
