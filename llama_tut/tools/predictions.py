"""Files of predictions: what a model answered, one line for each example."""

from llama_tut.tools.files import read_jsonl, require

NAMES = ("index", "label", "pred_sum", "pred_char", "pred_token")


def read_predictions(path):
    """The list of predictions that `files.write_jsonl` wrote.

    Raises:
        InputError: the file cannot be read; with the line that is wrong.
    """
    predictions = []
    for number, record in read_jsonl(path):
        missing = [name for name in NAMES if name not in record]
        require(not missing, f"{path}, line {number}: no {', '.join(missing)}")
        predictions.append(record)
    require(predictions, f"{path} holds no prediction")
    return predictions
