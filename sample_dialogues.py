"""Let an instruct model answer thousands of questions: text in its own words, which needs no download and no licence.

Reads   MODEL_DIR (a model that can chat)
Writes  OUTPUT_DIR/dialogues.parquet (messages, topic, kind), manifest.json. openwebtext_sentences_dataset.py makes
        sentences of the answers; capture_activations.py --dialogues captures the dialogues whole
Method  every topic below in every kind of text below, in a seeded order; each answer is sampled with its own seed, cut
        after its last whole sentence, and dropped if it is short, repeats itself or is not English
Cost    SmolLM2-135M on two cores: half an hour for a million tokens; 2 MB

    python sample_dialogues.py --model_dir models/smollm2-135M-Instruct-Q4_1
    torchrun --standalone --nproc_per_node=2 sample_dialogues.py --model_dir models/smollm2-135M-Instruct-Q4_1
"""

from typing import Literal

from pipeline.options import Count, CountOrZero, Positive, Seed, Share, parse_constants
from pipeline.run import run

MODEL_DIR: str  # folder or GGUF file of a model that can chat
OUTPUT_DIR = "data/dialogues"  # folder for the dialogues
NUM_DIALOGUES: CountOrZero = 0  # questions to ask, from the start of the seeded order; 0 for all
MAX_NEW_TOKENS: Count = 256  # longer answers are cut
TEMPERATURE: Positive = 0.8  # sampling temperature
TOP_P: Share = 0.95  # nucleus sampling
BATCH_SIZE: Count = 256  # answers sampled together
DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation
SEED: Seed = 0  # of the order and of the samples

_TOPICS = {
    "places": (
        "the sea; mountains; a desert; a forest; a river; an island; a lake; a cave; a volcano; a waterfall; a "
        "beach; a small village; a big city; London; Paris; New York; Tokyo; ancient Rome; Egypt; China; India; "
        "Africa; Australia; a castle; a bridge; a harbour; a farm; a garden; a library; a museum; a market; a hotel"
    ),
    "nature": (
        "rain; snow; a thunderstorm; the wind; a flood; an earthquake; the sun; the moon; the stars; spring; "
        "summer; autumn; winter; trees; flowers; roses; mushrooms; grass; fire; ice; climate change; gold; stones"
    ),
    "animals": (
        "dogs; cats; horses; birds; an eagle; fish; sharks; whales; elephants; lions; wolves; bears; snakes; "
        "spiders; bees; butterflies; ants; cows; sheep; chickens; mice; frogs; dinosaurs"
    ),
    "people": (
        "a mother; a father; a sister; a brother; grandparents; a baby; children; teenagers; an old man; a "
        "neighbour; a stranger; a king; a queen; a princess; a thief; a hero; a famous actor; a beggar; twins; an "
        "orphan"
    ),
    "family": (
        "a wedding; a divorce; a birth; a funeral; a family dinner; a birthday party; moving house; adoption; "
        "raising children; a family secret; an inheritance"
    ),
    "feelings": (
        "love; hate; fear; anger; joy; sadness; grief; jealousy; pride; shame; guilt; hope; loneliness; boredom; "
        "surprise; gratitude; trust; courage; friendship; homesickness; a broken heart; laughter; dreams; memories;"
        " regret; forgiveness; kindness; silence; beauty; time; luck; a secret; a lie; a promise"
    ),
    "food": (
        "bread; cheese; chocolate; coffee; tea; wine; beer; soup; pizza; pasta; rice; apples; oranges; bananas; "
        "tomatoes; potatoes; eggs; butter; sugar; salt; ice cream; cooking dinner; baking a cake; breakfast; a "
        "restaurant; a chef; hunger; a vegetarian diet; spices"
    ),
    "science": (
        "gravity; electricity; atoms; light; energy; evolution; genes; cells; bacteria; viruses; chemistry; "
        "physics; mathematics; numbers; geometry; a laboratory; an experiment; a microscope; a telescope; planets; "
        "Mars; black holes; space travel; astronauts; magnets; oxygen; statistics"
    ),
    "technology": (
        "computers; the internet; robots; artificial intelligence; smartphones; television; radio; cameras; "
        "engines; cars; trains; aeroplanes; ships; bicycles; rockets; batteries; passwords; software; video games; "
        "printing; clocks; steam engines; bridges and tunnels"
    ),
    "work": (
        "a job interview; the boss; a factory; an office; a strike; unemployment; retirement; a nurse; a teacher; a"
        " farmer; a carpenter; a fisherman; a pilot; a soldier; a police officer; a firefighter; a journalist; an "
        "engineer; a painter; a tailor; a meeting; a deadline; a salary"
    ),
    "money": (
        "money; a bank; debt; taxes; the stock market; poverty; wealth; gambling; shopping; prices; insurance; a "
        "business; trade; advertising; saving money"
    ),
    "history": (
        "the Second World War; the First World War; the Roman Empire; the Middle Ages; the French Revolution; the "
        "American Civil War; slavery; the Renaissance; the Industrial Revolution; the Vikings; pirates; knights; "
        "pharaohs; explorers; the Cold War; ancient Greece"
    ),
    "state and law": (
        "democracy; elections; the president; parliament; a judge; a trial; prison; a lawyer; the police; a murder;"
        " a robbery; human rights; freedom; equality; women's rights; borders; immigrants; refugees; corruption; a "
        "protest; a constitution; punishment"
    ),
    "war and peace": (
        "war; peace; an army; a battle; weapons; bombs; spies; a treaty; a general; soldiers coming home"
    ),
    "faith": (
        "God; prayer; angels; the devil; heaven; hell; a church; a mosque; a temple; Buddhism; Christianity; Islam;"
        " Judaism; Hinduism; miracles; ghosts; magic; witches; dragons; fairies; monsters; vampires; death; the "
        "soul; fate"
    ),
    "health": (
        "a headache; a cold; cancer; the heart; the brain; blood; bones; skin; eyes; teeth; sleep; exercise; yoga; "
        "smoking; alcohol; drugs; a hospital; a doctor; surgery; vaccines; pregnancy; blindness; stress; "
        "depression; old age"
    ),
    "sport": (
        "football; basketball; baseball; tennis; swimming; running a marathon; boxing; cycling; skiing; sailing; "
        "climbing; chess; the Olympic Games; a championship; a coach; losing a match; golf; horse racing"
    ),
    "arts": (
        "music; the piano; the guitar; the violin; singing; a choir; jazz; opera; dancing; ballet; painting; "
        "photography; sculpture; theatre; a film; poetry; a novel; fashion; architecture; a concert; drums; comedy;"
        " a circus"
    ),
    "learning": (
        "school; homework; an exam; university; reading books; writing; learning a language; a dictionary; grammar;"
        " curiosity; mistakes; philosophy; history lessons; a scholarship; bullying"
    ),
    "home": (
        "a kitchen; a bedroom; a chair; a table; a door; a key; a mirror; a window; a lamp; a clock; shoes; "
        "clothes; a hat; jewellery; a bag; toys; a letter; a photograph; soap; a fireplace; cleaning; paper; glass;"
        " wood; a knife"
    ),
    "travel": (
        "a long journey; a train station; an airport; a suitcase; a map; camping; hiking; a road trip; getting "
        "lost; a holiday; a passport; a cruise; tourists"
    ),
    "numbers, colours, senses": (
        "red; blue; green; black; white; yellow; the number seven; a triangle; a circle; darkness; noise; perfume; "
        "taste; heat; cold; speed; size; weight"
    ),
}
_KINDS = (
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Explain {} to a child.",
    "Write a news report about {}.",
    "Write a letter to a friend about {}.",
    "Write a dialogue between two people about {}.",
    "Write a diary entry about {}.",
    "What is good and what is bad about {}?",
    "What is the history of {}?",
    "Give me practical advice about {}.",
    "Write a speech about {}.",
    "What are some interesting facts about {}?",
)

_DECIDING = ("seed", "max_new_tokens", "temperature", "top_p", "batch_size", "dtype")  # the result
_DIALOGUE_BYTES = 2000  # on disk, at most
_MIN_WORDS = 40  # of an answer
_MIN_DISTINCT = 0.7  # share of an answer's runs of four words that are new in it
_MIN_ASCII = 0.97  # share of an answer's characters

if __name__ == "__main__":
    run(lambda: parse_constants(globals()))  # before the slow imports: --help answers at once

import hashlib
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from llama_3 import load_model, load_tokenizer
from llama_3.chat import Message, check_chat, encode_dialogue, usual_date
from llama_3.checkpoint import checkpoint_identity
from llama_3.generation import check_context, stream
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from pipeline.dialogues import DIALOGUES, DIALOGUES_SCHEMA, read_dialogue_rows, write_dialogue_rows
from pipeline.distributed import World, world
from pipeline.files import locked, require_disk, sha256
from pipeline.manifests import complete_already, write_manifest
from pipeline.progress import progress_bar

_STAGE = "sample_dialogues.py"

# ---- questions and answers


class Question(NamedTuple):
    topic: str
    kind: str
    seed: int

    @property
    def text(self) -> str:
        return self.kind.format(self.topic)


def questions(n: int, seed: int) -> list[Question]:
    """The first n questions of the seeded order, 0 for all."""
    topics = [topic for theme in _TOPICS.values() for topic in theme.split("; ")]
    pairs = [(topic, kind) for topic in topics for kind in _KINDS]
    random.Random(seed).shuffle(pairs)
    return [Question(*pair, seed + i) for i, pair in enumerate(pairs)][: n or None]


def whole_sentences(answer: str) -> str:
    """An answer up to the end of its last whole sentence; empty if it has none."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]*]*(?=\s|$)", answer)]
    return answer[: ends[-1]].strip() if ends else ""


def is_worth_keeping(answer: str) -> bool:
    """Whether an answer is long enough, does not repeat itself and is English text."""
    words = answer.split()
    if len(words) < _MIN_WORDS:
        return False
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    ascii_share = sum(map(str.isascii, answer)) / len(answer)
    return len(set(fours)) >= _MIN_DISTINCT * len(fours) and ascii_share >= _MIN_ASCII


class Sampling(NamedTuple):
    max_new_tokens: int
    temperature: float
    top_p: float


class Answerer(NamedTuple):
    """A model that answers questions."""

    model: Transformer
    tokenizer: Tokenizer
    sampling: Sampling

    def prompt(self, question: Question) -> list[int]:
        return encode_dialogue(
            self.tokenizer, [Message("user", question.text)], usual_date(self.model.args.rope_scaling_factor)
        )

    def check(self, asked: list[Question]) -> None:
        """Raise InputError if the model's context is too short for the questions and their answers."""
        longest = max(len(self.prompt(question)) for question in asked)
        check_context(self.model, longest, self.sampling.max_new_tokens)

    def answers(self, asked: list[Question]) -> list[str]:
        """Sampled in one batch."""
        prompts, seeds = [self.prompt(question) for question in asked], [question.seed for question in asked]
        steps = stream(self.model, self.tokenizer, prompts, seeds=seeds, **self.sampling._asdict())
        return ["".join(pieces) for pieces in zip(*steps, strict=True)]


# ---- parts on disk


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def write_part(path: Path, asked: list[Question], answers: list[str]) -> None:
    """Write the dialogues worth keeping."""
    kept = [(question, whole_sentences(answer)) for question, answer in zip(asked, answers, strict=True)]
    rows = [
        {
            "messages": [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": answer},
            ],
            "topic": question.topic,
            "kind": question.kind,
        }
        for question, answer in kept
        if is_worth_keeping(answer)
    ]
    write_dialogue_rows(path, pa.Table.from_pylist(rows, schema=DIALOGUES_SCHEMA))


def sample_share(answerer: Answerer, batches: list[list[Question]], folder: Path, w: World) -> None:
    """Sample this process's batches, except those already written."""
    share = range(w.rank, len(batches), w.size)
    todo = [i for i in share if not part_path(folder, i).exists()]
    total, left = (sum(len(batches[i]) for i in numbers) for numbers in (share, todo))
    label = "dialogues" if w.size == 1 else f"dialogues, process 1 of {w.size}"
    with progress_bar(total=total, initial=total - left, unit="dialogue", desc=label, disable=not w.is_main) as bar:
        for number in todo:
            write_part(part_path(folder, number), batches[number], answerer.answers(batches[number]))
            bar.update(len(batches[number]))


def finish(folder: Path, n_parts: int, n_asked: int, tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    """Join the parts into dialogues.parquet and write the manifest."""
    table = pa.concat_tables([read_dialogue_rows(part_path(folder, number)) for number in range(n_parts)])
    path = folder / DIALOGUES
    write_dialogue_rows(path, table)
    answers = [messages[-1]["content"] for messages in table["messages"].to_pylist()]
    counts = {
        "dialogues": len(answers),
        "dropped": n_asked - len(answers),
        "tokens": sum(len(tokenizer.encode(answer)) for answer in answers),
        "characters": sum(map(len, answers)),
    }
    shard = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    write_manifest(folder, _STAGE, complete=True, **fields, counts=counts, shards=[shard])
    remove_parts(folder)
    print(
        f"{counts['dialogues']:,} dialogues with {counts['tokens']:,} tokens of answers, {counts['dropped']:,} "
        f"dropped: {path}"
    )


def remove_parts(folder: Path) -> None:
    for path in folder.glob("part-*.parquet"):
        path.unlink()


def main() -> None:
    config = parse_constants(globals())
    tokenizer = load_tokenizer(config.model_dir)
    check_chat(tokenizer)
    asked = questions(config.num_dialogues, config.seed)
    batches = [asked[i : i + config.batch_size] for i in range(0, len(asked), config.batch_size)]
    decides = {
        "model": checkpoint_identity(config.model_dir),
        "questions": hashlib.sha256("\n".join(question.text for question in asked).encode()).hexdigest(),
        **{name: getattr(config, name) for name in _DECIDING},
    }
    folder = Path(config.output_dir)
    packed = not torch.cuda.is_available()  # packed weights are for CPUs
    model = load_model(config.model_dir, "cpu", getattr(torch, config.dtype), packed=packed)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    Answerer(model, tokenizer, sampling).check(asked)

    with world() as w, locked(folder, w.rank, w.barrier):
        if w.gather(w.is_main and complete_already(folder, _STAGE, decides))[0]:
            if w.is_main:
                remove_parts(folder)
            return
        if w.is_main:
            require_disk(folder, _DIALOGUE_BYTES * len(asked))
        w.print(f"Asking {len(asked):,} questions; writing to {folder}.")
        sample_share(Answerer(model.to(w.device), tokenizer, sampling), batches, folder, w)
        w.barrier()
        if w.is_main:
            finish(folder, len(batches), len(asked), tokenizer, {"decides": decides, "config": vars(config)})


if __name__ == "__main__":
    run(main)
