"""Pick the next reply of a dialogue: ``python docs/examples/pick_a_reply.py``.

The prepared replies of a help desk are encoded once; each line of the customer is then a query. Runs offline, with the
bundled model.
"""

from mixencoder import MixEncoder

REPLIES = [
    "Hello! What can I do for you?",
    "You can reset your password with the link below the login form.",
    "The reset mail can take some minutes. Please look into your spam folder, too.",
    "Your parcel is on its way; the tracking number is in the mail that we sent you.",
    "I am sorry that it arrived broken. We will send you a new one and you need not return it.",
    "You can return it within thirty days; the label is in the parcel.",
    "The money will be on your account within five working days.",
    "We accept credit cards, bank transfer and cash on delivery.",
    "Could you tell me the number of your order?",
    "You can cancel the subscription at any time in your account's settings.",
    "Please switch the device off, wait ten seconds and switch it on again.",
    "Glad to hear that it works now!",
]
CUSTOMER = [
    "Hi, I can't log in any more, I think I forgot my password.",
    "I did that but I don't get any mail from you.",
    "Ah, there it was, I'm in again. Thank you!",
    "By the way, the lamp you delivered yesterday has a crack in its glass.",
]


def main() -> None:
    """Print the customer's lines, each with the two best replies."""
    model = MixEncoder.from_pretrained()
    replies = model.encode_document(REPLIES)
    for line in CUSTOMER:
        best, second = model.rank(line, replies, top_k=2)
        print(f"customer   {line}")
        print(f"reply      {REPLIES[best['corpus_id']]}  ({best['score']:.2f})")
        print(f"next best  {REPLIES[second['corpus_id']]}  ({second['score']:.2f})\n")


if __name__ == "__main__":
    main()
