"""Named values of settings that are neither numbers, texts nor paths."""

from enum import StrEnum


class Dtype(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Transport(StrEnum):
    AUTO = "auto"
    NCCL = "nccl"
    GLOO = "gloo"
    IPC = "ipc"


class SyncMode(StrEnum):
    GATHER = "gather"
    DIRECT = "direct"


class Spread(StrEnum):
    NOTHING = "nothing"
    ANSWER = "answer"
    SOURCE = "source"


class Advantage(StrEnum):
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"
    RLOO = "rloo"


class Loss(StrEnum):
    CLIP = "clip"
    GSPO = "gspo"
    CISPO = "cispo"


class LossOn(StrEnum):
    RESPONSES = "responses"
    ASSISTANT_TURNS = "assistant_turns"


class KlEstimator(StrEnum):
    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class Aggregation(StrEnum):
    TOKEN_MEAN = "token_mean"
    SEQUENCE_MEAN = "sequence_mean"
    CONSTANT = "constant"


class Correction(StrEnum):
    AUTO = "auto"
    NONE = "none"
    TIS = "tis"
    MIS = "mis"
    MIS_SEQUENCE = "mis_sequence"


class OnPush(StrEnum):
    WAIT = "wait"
    KEEP = "keep"
    ABORT = "abort"


class Stragglers(StrEnum):
    WAIT = "wait"
    DROP = "drop"


class PromptTemplate(StrEnum):
    CHAT = "chat"
    RAW = "raw"


class BadRows(StrEnum):
    REFUSE = "refuse"
    SKIP = "skip"


class AnswerKeys(StrEnum):
    GIVEN = "given"
    SHUFFLED = "shuffled"


class LevelsFrom(StrEnum):
    ANNOTATED = "annotated"
    OBSERVED = "observed"


class TruncatedReward(StrEnum):
    NOTHING = "nothing"
    GRADE = "grade"


class RewardSignature(StrEnum):
    ALPHAMED = "alphamed"
    VERL = "verl"
    TRL = "trl"


class OldLogprobs(StrEnum):
    AUTO = "auto"
    RECOMPUTE = "recompute"


class Recompute(StrEnum):
    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class ReferencePlace(StrEnum):
    RESIDENT = "resident"
    OFFLOADED = "offloaded"


class Schedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class WandbMode(StrEnum):
    OFFLINE = "offline"
    ONLINE = "online"
    OFF = "off"
