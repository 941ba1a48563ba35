"""Small data in the formats of the paper's data sets, made from the built-in world: to try every command without a hub.

    python experiments/made_data.py FOLDER

    FOLDER/train/         Parquet as the authors' training set: id, problem, solution, image, img_height, img_width
    FOLDER/NAME.parquet   as the test sets, with questions that assets/tiny understands (docs/benchmarks.md): grefcoco,
                          reasonseg, isic, realiad, omniact, mathvista, chartqa, docvqa
    FOLDER/sam2/          a SAM 2 with random weights

and the built-in world's own pictures in the layouts that other people's data comes in (docs/data.md):

    FOLDER/lines/         JSON lines and a folder of pictures
    FOLDER/qwen/          JSON lines as Qwen's and VLM-R1's: conversations, the answer a box in a fence
    FOLDER/llava/         as LLaVA and ShareGPT: conversations
    FOLDER/swift/         as ms-swift: messages, and objects for what <ref-object> and <bbox> stand for
    FOLDER/coco/          boxes as COCO's annotations: [x, y, width, height]
    FOLDER/thousandths/   boxes in thousandths of the picture's sides
    FOLDER/tasks/         several tasks, named in a column kind
    FOLDER/messages.parquet     as LLaMA-Factory and TRL: messages with a system turn
    FOLDER/completions.parquet  as TRL: prompt and completion, lists of parts
    FOLDER/easyr1/        Parquet as EasyR1 reads it: images, problem, answer
    FOLDER/verl.parquet   as verl reads it: prompt (messages), images, reward_model
    FOLDER/trl/           as TRL's GRPO reads it: prompt (messages), image, solution
    FOLDER/scienceqa.parquet    a column task of its own, choices, and a worked solution beside the answer
    FOLDER/saved/         written by datasets' save_to_disk, two splits
    FOLDER/hub/           a cache of the hub with the data set made/shapes, of two configurations
"""
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import scenes  # noqa: E402

ROWS, TEST_ROWS = 12, 64
# benchmark: the split its rows are taken from. An absent target stands for a part without an anomaly.
GROUNDING = {"grefcoco": "test", "reasonseg": "reasoning-test", "isic": "lesion-test", "realiad": "test",
             "omniact": "test"}


def examples(split: str, task: str = "scene_grounding", absent: bool = True):
    """Examples of a split, in order; without absent targets unless they are wanted."""
    for index in range(scenes.SPLITS[split]):
        row = scenes.make(split, index)
        if row["task"] == task and (absent or row["answer"] != "[]"):
            yield index, row


def image_cell(image) -> dict:
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def test_row(index: int, row: dict, with_box: bool) -> dict:
    boxes = [item["bbox_2d"] for item in json.loads(row["answer"])]
    mask = np.zeros((scenes.SIZE, scenes.SIZE), bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2 + 1, x1:x2 + 1] = True
    cells = {"image": image_cell(row["image"]), "text": row["question"], "mask": mask.tolist(), "image_id": index,
             "ann_id": 0, "img_height": scenes.SIZE, "img_width": scenes.SIZE}
    return {**cells, "bbox": boxes[0]} if with_box else cells


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    print(f"{path}: {len(rows)} rows of {', '.join(rows[0])}")


def write_lines(folder: Path, rows: list[dict], columns) -> None:
    """JSON lines beside their pictures. columns: row → what its line holds beside the picture."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w") as file:
        for i, row in enumerate(rows):
            row["image"].save(folder / "pictures" / f"{i}.png")
            file.write(json.dumps({"image": f"pictures/{i}.png", **columns(row)}) + "\n")
    print(f"{folder / 'train.jsonl'}: {len(rows)} lines")


def boxes_of(row: dict) -> list[list[int]]:
    return [item["bbox_2d"] for item in json.loads(row["answer"])]


def fenced(row: dict) -> str:
    items = [{"bbox_2d": box, "label": row["question"]} for box in boxes_of(row)]
    return f"```json\n{json.dumps(items)}\n```"


def messages(question, answer=None, system: str = "") -> list[dict]:
    turns = [("system", system)] * bool(system) + [("user", question)] + [("assistant", answer)] * (answer is not None)
    return [{"role": role, "content": content} for role, content in turns]


def thousandths(row: dict) -> list[list[int]]:
    return [[round(1000 * c / scenes.SIZE) for c in box] for box in boxes_of(row)]


def write_chats(folder: Path, shapes: list[dict], present: list[dict], sums: list[dict]) -> None:
    """Questions and answers as turns of a chat, and boxes as others write them."""
    write_lines(folder / "lines", shapes, lambda row: {
        "problem": row["question"], "solution": json.loads(row["answer"])})
    write_lines(folder / "qwen", shapes, lambda row: {"conversations": [
        {"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": fenced(row)}]})
    write_lines(folder / "llava", sums, lambda row: {"conversations": [
        {"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]})
    write_lines(folder / "swift", present, lambda row: {
        "messages": messages("<image><ref-object>", "<bbox>" * len(boxes_of(row))),
        "objects": {"ref": [row["question"]], "bbox": boxes_of(row)}})
    write_lines(folder / "coco", shapes, lambda row: {"question": row["question"], "annotations": [
        {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 1} for x1, y1, x2, y2 in boxes_of(row)]})
    write_lines(folder / "thousandths", shapes, lambda row: {
        "problem": row["question"], "solution": [{"bbox_2d": box} for box in thousandths(row)]})
    write_lines(folder / "tasks", [*shapes[:6], *sums[:6]], lambda row: {
        "kind": row["task"], "question": row["question"], "answer": row["answer"]})
    write(folder / "messages.parquet", [
        {"messages": messages(f"<image>{row['question']}", row["answer"], "Answer by a number."),
         "images": [image_cell(row["image"])]} for row in sums])
    write(folder / "completions.parquet", [
        {"prompt": messages([{"type": "image", "text": None}, {"type": "text", "text": row["question"]}]),
         "completion": [{"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}],
         "images": [image_cell(row["image"])]} for row in sums])
    write(folder / "several.parquet", [
        {"images": [image_cell(row["image"]) for row in pair], "answer": sum(int(row["answer"]) for row in pair),
         "problem": "What is the sum of the digits in <image> and in <image>?"}
        for pair in zip(sums, sums[1:] + sums[:1])])
    write(folder / "scienceqa.parquet", [
        {"image": image_cell(row["image"]), "question": row["question"], "choices": ["none", f"{row['answer']} in all"],
         "answer": 1, "task": "closed choice", "solution": "They are added."} for row in sums])


def write_layouts(folder: Path) -> None:
    import datasets
    shapes = [row for _, (_, row) in zip(range(ROWS), examples("train"))]
    present = [row for _, (_, row) in zip(range(ROWS), examples("train", absent=False))]
    sums = [scenes.make("sums-test", i) for i in range(ROWS)]
    write_chats(folder, shapes, present, sums)
    easyr1 = [{"images": [image_cell(row["image"])], "problem": f"<image>{row['question']}", "answer": row["answer"]}
              for row in shapes]
    write(folder / "easyr1" / "train-00000-of-00001.parquet", easyr1)
    write(folder / "easyr1" / "test-00000-of-00001.parquet", easyr1[:4])
    write(folder / "verl.parquet", [
        {"data_source": "made/sums", "prompt": [{"role": "user", "content": f"<image>\n{row['question']}"}],
         "images": [image_cell(row["image"])], "reward_model": {"style": "rule", "ground_truth": row["answer"]}}
        for row in sums])
    write(folder / "trl" / "train-00000-of-00001.parquet", [
        {"prompt": [{"role": "user", "content": row["question"]}], "image": image_cell(row["image"]),
         "solution": f"<think>I add them.</think> <answer>{row['answer']}</answer>"} for row in sums])
    rows = datasets.Dataset.from_list([{"image": image_cell(row["image"]), "problem": row["question"],
                                        "solution": row["answer"]} for row in shapes])
    rows = rows.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(folder / "saved")
    cache = folder / "hub" / "datasets--made--shapes"
    snapshot = cache / "snapshots" / ("0" * 40)
    for config, part in (("few", range(4)), ("all", range(ROWS))):
        (snapshot / config).mkdir(parents=True, exist_ok=True)
        rows.select(part).to_parquet(snapshot / config / "train-00000-of-00001.parquet")
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text("0" * 40)
    print(f"{folder / 'saved'}, {folder / 'hub'}: {ROWS} rows")


def write_sam2(folder: Path) -> None:
    import torch
    from transformers import Sam2Config, Sam2Model
    torch.manual_seed(0)
    Sam2Model(Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "image_size": [128, 128], "hidden_size": 8,
                "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2], "global_attention_blocks": [3]},
            "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 32},
        prompt_encoder_config={"image_size": 128, "hidden_size": 32},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )).save_pretrained(folder)
    print(f"{folder}: a SAM 2 with random weights")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    rows = []
    for _, (index, row) in zip(range(4 * ROWS), examples("train")):
        answer = [{key: [round(7.5 * c) for c in value] for key, value in item.items()}
                  for item in json.loads(row["answer"])]
        rows.append({"id": f"made_{index}", "problem": row["question"], "solution": json.dumps(answer),
                     "image": image_cell(row["image"].resize((840, 840))),
                     # The authors' script stores the size before it brings picture and boxes to 840×840.
                     "img_height": scenes.SIZE, "img_width": scenes.SIZE})
    write(folder / "train" / "train-00000-of-00001.parquet", rows)
    for name, split in GROUNDING.items():
        rows = examples(split, absent=name != "omniact")
        write(folder / f"{name}.parquet", [test_row(i, row, name == "omniact")
                                           for _, (i, row) in zip(range(TEST_ROWS), rows)])
    counts = [row for _, (_, row) in zip(range(TEST_ROWS), examples("test", "vqa"))]
    write(folder / "mathvista.parquet", [
        {"pid": str(i), "question": row["question"], "decoded_image": image_cell(row["image"]), "answer": row["answer"],
         "choices": None} for i, row in enumerate(counts)])
    write(folder / "chartqa.parquet", [{"image": image_cell(row["image"]), "query": row["question"],
                                        "label": [row["answer"]]} for row in counts])
    write(folder / "docvqa.parquet", [{"questionId": str(i), "image": image_cell(row["image"]),
                                       "question": row["question"], "answers": [row["answer"]]}
                                      for i, row in enumerate(counts)])
    write_sam2(folder / "sam2")
    write_layouts(folder)


if __name__ == "__main__":
    main()
