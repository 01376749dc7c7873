"""torchrun as train_ddp.sh starts it: see llama_tut/tools/launch.py."""

from llama_tut.tools.launch import main

if __name__ == "__main__":
    main()
