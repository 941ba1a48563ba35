"""Masks of boxes and points, by SAM 2 (docs/paper.md, section 5): for each object its point and its
box are the prompt, the best-scored of three masks is taken, and the union of all objects is the
answer.

The model is transformers' Sam2Model. Its Sam2Processor needs torchvision, so resizing,
normalisation and the way back are written here, as that processor does them.
"""
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from support.mistakes import Mistake

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Segmenter:
    def __init__(self, folder: str, device):
        from transformers import Sam2Model
        try:
            self.model = Sam2Model.from_pretrained(folder, use_safetensors=True).to(device).eval()
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0][:150]
            raise Mistake(f"--masks {folder}: neither a folder with a SAM 2 model nor a hub id that can be had "
                          f"({reason})") from None
        self.side = self.model.config.prompt_encoder_config.image_size     # pixels of the square it sees: 1024

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns [3, side, side], float32."""
        resized = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR)
        return ((torch.from_numpy(np.array(resized)) / 255 - MEAN) / STD).permute(2, 0, 1)

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], objects: list[list[dict]]) -> list[np.ndarray]:
        """Takes images and, for each, its boxes and points in its own pixels → bool masks [height,
        width]. No objects, an empty mask. The images are encoded together."""
        wanted = [i for i, items in enumerate(objects) if items]
        masks = [np.zeros((image.height, image.width), bool) for image in images]
        if not wanted:
            return masks
        pixels = torch.stack([self.pixels(images[i]) for i in wanted]).to(self.model.device)
        features = self.model.get_image_embeddings(pixels)
        for at, i in enumerate(wanted):
            width, height = images[i].size
            scale = torch.tensor([self.side / width, self.side / height])
            points = torch.tensor([item["point_2d"] for item in objects[i]], dtype=torch.float32) * scale
            boxes = torch.tensor([item["bbox_2d"] for item in objects[i]], dtype=torch.float32) * scale.repeat(2)
            out = self.model(image_embeddings=[level[at:at + 1] for level in features],
                             input_points=points[None, :, None].to(pixels.device),                # [1, objects, 1, 2]
                             input_boxes=boxes[None].to(pixels.device),                            # [1, objects, 4]
                             multimask_output=True)
            best = out.iou_scores[0].argmax(-1)                                                    # [objects]
            logits = out.pred_masks[0][torch.arange(len(best)), best]                              # [objects, 256, 256]
            logits = nn.functional.interpolate(logits[None].float(), (height, width), mode="bilinear")[0]
            masks[i] = (logits > 0).any(0).cpu().numpy()
        return masks
