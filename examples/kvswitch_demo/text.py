"""Things people might say to an assistant, cut to whatever length a workload asks for."""

from __future__ import annotations

from itertools import accumulate, product

import numpy as np

from kvswitch_demo.tokenizer import Tokenizer

__all__ = ["PromptText"]

FEWEST_WORDS = 3  # tokens that must be left for words, for the chat format to be put around them
LONGEST_REMARK = 28  # tokens; beyond that few remarks have the same length


class PromptText:
    """Makes user turns of an exact number of tokens, the same ones for the same seed.

    A short turn is a question or a remark, and perhaps a wish how to answer; a longer one is a task
    and a piece of text to do it on. A turn too short for the chat format is words alone.

    Parameters
    ----------
    tokenizer : Tokenizer
    seed : int
        At least 0.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._openers = self._by_length(OPENERS)
        self._follow_ups = self._by_length(FOLLOW_UPS)
        self._tasks = [tokenizer.encode(task) for task in _lines(TASKS)]
        sentences = [tokenizer.encode(f" {sentence}") for sentence in _lines(PASSAGES)]
        self._passages = [token for sentence in sentences for token in sentence]
        self._sentence_starts = list(accumulate(map(len, sentences[:-1]), initial=0))

    def __call__(self, conversation: int, turn: int, tokens: int) -> list[int]:
        """Token ids of a user turn, `tokens` of them with the chat format around the words.

        Parameters
        ----------
        conversation, turn : int
            Numbers from 0; the first turn of a conversation opens it, others follow up.
        tokens : int
            At least 1.
        """
        rng = np.random.default_rng((self._seed, conversation, turn))
        for first in (turn == 0, True):  # at need, the last answer is left without its end
            frame = self._tokenizer.turn([], first=first)
            room = tokens - len(frame)
            if room >= FEWEST_WORDS:
                return self._tokenizer.turn(self._words(rng, turn, room), first=first)
        return self._words(rng, turn, tokens)

    def _words(self, rng: np.random.Generator, turn: int, tokens: int) -> list[int]:
        phrases = self._follow_ups if turn else self._openers
        if tokens in phrases and tokens <= LONGEST_REMARK:
            return phrases[tokens][rng.integers(len(phrases[tokens]))]
        task = self._tasks[rng.integers(len(self._tasks))]
        start = self._sentence_starts[rng.integers(len(self._sentence_starts))]
        rest = np.arange(start, start + max(0, tokens - len(task))) % len(self._passages)
        return [*task[:tokens], *(self._passages[index] for index in rest)]

    def _by_length(self, text: str) -> dict[int, list[list[int]]]:
        """Each line of `text`, alone and with every wish, by number of tokens."""
        wishes = ["", *(f" {wish}" for wish in _lines(WISHES))]
        phrases: dict[int, list[list[int]]] = {}
        for line, wish in product(_lines(text), wishes):
            tokens = self._tokenizer.encode(line + wish)
            phrases.setdefault(len(tokens), []).append(tokens)
        return phrases


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


OPENERS = """
Hi!
Hello there.
Good morning!
Tell me a joke.
Tell me a story.
What is a fjord?
Why is snow white?
Who invented paper?
How do magnets work?
Why do cats purr?
How deep is the sea?
What makes bread rise?
Name three kinds of cheese.
Why do leaves turn red?
What is a leap year for?
How do I boil an egg?
How far away is the Moon?
Explain how a zip works.
Write a haiku about rain.
What does a conductor do?
How do birds find their way?
Which planet has the most moons?
Why does the sea taste of salt?
Give me a name for a grey cat.
What should I cook with two leeks?
How do I get ink out of cotton?
Describe a harbour early in the morning.
What is the difference between jam and jelly?
Why do we yawn when others do?
How does a fridge keep things cold?
Suggest a quiet hobby for long winters.
Explain what a prime number is, please.
How do you say thank you in Japanese?
What can I plant on a shady balcony?
How many strings does a cello have?
Why is the sky dark at night?
How long does it take to learn to swim?
Write a short poem about a lighthouse keeper.
What are the rules of noughts and crosses?
How would you explain the tides to a child?
Is it true that bamboo is a kind of grass?
Which instruments are played in a string quartet?
What happens to a letter after I post it?
How can I keep herbs fresh for a week?
Please list five things to take on a day hike.
Why do some metals rust while gold never seems to?
What was daily life like in a medieval town?
How do I politely turn down an invitation to dinner?
Give me three reasons to learn to play the piano.
What is the best way to store potatoes over winter?
Explain the difference between weather and climate in two sentences.
How does a sewing machine make a stitch with two threads?
I have a job interview tomorrow. How should I prepare for it?
What did sailors eat on long voyages before there were tins?
Can you explain why ice floats on water when most solids sink?
My bicycle squeaks on every turn of the pedals. What could it be?
Write a birthday message for a colleague whom I do not know well.
How do bees tell each other where to find flowers that are worth a visit?
I would like to read more this year. How do I make it a habit?
What is the difference between a comet, an asteroid and a meteor?
Suggest a weekend trip for two people who like old trains and long walks.
Why do old books have that smell, and can I do anything to preserve them?
How do I sharpen a kitchen knife at home without spoiling the blade?
Imagine that a river could speak. What would it say to the town on its banks?
Our school is putting on a play about explorers. What could the first scene look like?
I planted tomatoes in May and the leaves are curling. Should I be worried about that?
How does a dictionary get made, and who decides which new words are put into it?
Explain how a vaccine prepares the body, as you would to somebody of twelve years.
My neighbour plays the drums in the evening. How can I bring it up without a quarrel?
What would a fair way of sharing household chores among four flatmates look like?
Write the opening paragraph of a mystery that is set in a small museum of clocks.
Please give me a simple recipe for vegetable soup that does not need any special equipment.
I want to teach my daughter to ride a bicycle this weekend. What are the steps to take?
Which is the better way to heat a small house in a cold place, a stove or a heat pump, and why?
How do archaeologists work out the age of a piece of pottery that they have found in a field?
I have to give a speech at my sister's wedding and hate speaking in public. What would you advise?
How did people tell the time at sea, and why did it matter so much for knowing where the ship was?
Plan a week of dinners for a family of four that eats no meat and has little time on weekdays.
My train was cancelled and I missed a concert. Write a polite letter that asks for my money back.
"""

FOLLOW_UPS = """
Why?
Go on.
And then?
Really?
I see.
Tell me more.
Why is that?
How so?
Are you sure?
What comes next?
Make it shorter.
Say that again, please.
Give me an example.
What about in winter?
Thank you, that helps.
Can you explain that?
And what does it cost?
Please put it more simply.
Who came up with that?
Is there another way?
How long would that take?
What if it rains?
I do not understand the second part.
Could you turn this into a list?
Which of these would you choose?
Now write it as a poem.
What are the risks of doing that?
Try again with a happier ending.
Where could I learn more about it?
Do the same for a younger reader.
What would somebody who disagrees say?
How do I know whether it worked?
Is that still true today, or was it once?
Please add two more points to what you said.
Can you compare that with how it used to be?
What is the most common mistake people make with this?
Good. Now explain the part about the beginning again.
Leave out the technical words and keep it friendly.
I tried that once and it did not work. What now?
How would your answer change if I had only one day?
Could you give me the short version and then the long one?
That is longer than I need. Two sentences will do.
What would you do first if you were in my place?
My brother says it is the other way round. Is he right?
Which tools or materials do I need before I can begin?
Let us go through it step by step. What is the first one?
Please rewrite your last answer as a letter to a good friend.
I like the idea, but we have very little money. What could we leave out?
Interesting. Does the same hold in other countries, or only where you looked?
Can you think of a picture or a comparison that would make this easy to remember?
Suppose that I wanted to teach this to a class of ten. How would I go about it?
Before we go on, sum up what we have said so far so that I can write it down.
That answers half of my question. The other half was about what happens when things go wrong.
What would be a good next step for somebody who has understood this and would like to go deeper?
I am not convinced yet. Give me the strongest argument for it and the strongest one against it.
"""

WISHES = """
Please.
Be brief.
Keep it short.
Take your time.
I am curious.
I am in a hurry.
Use plain words.
Two sentences will do.
I have no idea myself.
A short answer is enough.
You may guess if you must.
Explain it as to a friend.
My son would like to know.
I need it for a school paper.
Do not spare me the details.
Please begin with the main point.
We were just talking about it at lunch.
If there is more than one answer, give two.
I have asked others, and nobody could tell me.
Write it so that I can read it out to my class.
A list of three points would suit me best, if that is possible.
I am going to put it on a card, so every word should count.
"""

TASKS = """
Sum up:
Translate this into plain English:
What is this text about?
Continue this text:
Find a title for this:
Sum this up in one sentence:
Correct the spelling, if need be:
What is the mood of this passage?
Retell this for a child of six:
List the main points of what follows:
Turn the following into a short dialogue:
Which facts does the writer give here?
I wrote this yesterday. How could it be better?
Make three quiz questions from this text:
Write a reply to somebody who sent you this:
Pick out the words that a learner may not know:
Please read this and tell me what you would cut:
What do you think happens after this?
"""

PASSAGES = """
The bakery on the corner opens at five, when the street is still dark.
By then the ovens have been hot for hours and the first loaves are cooling on racks by the window.
Most customers come on foot, and most of them want the same thing every day.
The baker knows them by their coats.
She says that bread is a matter of patience, since flour and salt are the same everywhere.
Water moves through a forest more slowly than it looks.
Rain that falls on the leaves may drip for an hour after the clouds have gone.
What reaches the ground sinks into moss and old needles, which hold it like a sponge.
A tree drinks a small part of it, and the rest finds its way to a stream in days or months.
Where the trees have been cut, the same rain arrives in the valley within the hour, brown with soil.
My grandfather repaired clocks in a room that was no larger than a cupboard.
Every wall was covered with them, and no two showed the same time.
He claimed that a clock which is always a little wrong is better company than one that has stopped.
When he was out, we children moved the hands and waited to see whether he would notice.
He always did, and he never said a word about it.
The first bridge over the river was built of wood and lasted nine winters.
The second was stone, with five arches, and a toll house at its northern end.
Carts paid two pennies, sheep one for every ten, and soldiers nothing at all.
In dry summers people forded the river to save the toll, until thorns were planted there.
Today the stone bridge carries bicycles only, and traffic crosses on concrete a mile upstream.
A good map leaves out nearly everything.
It does not show the smell of the harbour or the dog that sleeps in front of the post office.
What remains is chosen by somebody who had a purpose in mind, such as sailing, taxing or walking.
For that reason two honest maps of one place can look like two different countries.
Before you trust a map, ask who needed it.
Bees visit the same kind of flower for as long as it pays.
A worker that has found a field of clover returns to the hive and dances on the comb.
The direction of her dance tells the others where to fly, and its length tells them how far.
On cloudy days she remembers where the sun must be.
Nobody in the hive gives orders, and yet by evening the best fields have received the most visitors.
The night train left the coast at ten and reached the mountains at dawn.
In my compartment sat a teacher with a cello, a boy with a cage, and a man who slept in his hat.
The cage was covered with a cloth, and whatever was in it hummed.
Around midnight the teacher asked what it was, and the boy said that he did not know yet.
We all looked at the cloth until the lights were turned down.
To make a simple soup, start with an onion and more time than you think you need.
Cut it fine, and let it soften in oil over a low flame until it is sweet.
Add carrots, a potato, a handful of lentils and enough water to cover them.
After half an hour taste it, and add salt little by little.
A spoonful of vinegar at the end does more than any spice.
Glass is made from sand, ash and heat.
The ash makes the sand melt sooner, and a little lime keeps the result from dissolving in water.
For centuries the recipe was guarded, and glassmakers on some islands were forbidden to leave.
The secret travelled all the same, in the heads of those who rowed away at night.
A pane that is flat and clear was a luxury until machines learned to float molten glass on tin.
The library in our town lends more than books.
There is a shelf of drills, a telescope, two sewing machines and a tent for six.
People sign for them with the same card, and they come back cleaner than they went.
The librarian keeps a list of what has been asked for and was not there.
At the top of it, for three years now, stands a piano.
When the volcano had been quiet for a century, people began to plant vines on its slopes.
The soil was black and crumbled in the hand, and the grapes tasted faintly of smoke.
Old farmers built their houses with the door facing away from the summit.
Asked about it, they would say that it was because of the wind.
The young ones laughed and put in large windows with a view.
Sound needs something to travel through.
In air it covers a kilometre in three seconds, so that you can judge the distance of a storm.
In water it is more than four times faster, and in steel faster still.
Whales use this to call each other across a whole sea.
Between the planets there is nothing to carry it, and the loudest explosion is silent.
The market begins before sunrise, when the boats come in.
Fish are sold from the deck, by weight and by shouting.
By eight the cooks have gone, and the families arrive with baskets and small children.
At noon the square is washed down, and gulls walk about as if they owned it.
In the afternoon nothing shows that there was a market, apart from one crate and the smell.
Learning an instrument is a long conversation with your own hands.
At first they do not listen, and after a month they listen but forget.
Ten minutes every day are worth more than two hours on a Sunday.
Play slowly enough that you make no mistakes, since hands remember those just as well.
One day the piece plays itself, and you will not know when that began.
The letter had been posted in 1931 and was delivered last Tuesday.
It was found behind a sorting rack when the old post office was turned into flats.
The sender asked her cousin to meet her at the station, and to bring the blue umbrella.
Nobody of that name lives in our street any more.
The postman pinned a copy to the board, and now everybody looks out for a blue umbrella.
Concrete is older than it seems, for the Romans poured it into the sea.
They mixed lime with ash from volcanoes, and the salt water made it harder year by year.
Modern concrete sets in a day and carries far more, but steel bars inside it rust in time.
Engineers now study harbours that are two thousand years old to find out what was forgotten.
One of their samples smelled of seaweed when it was cut.
In the high valley the snow stays until May, and school begins when the road is clear.
Eleven pupils share one room and one teacher, who also drives the plough.
The oldest help the youngest with reading, and everyone helps with the wood.
Inspectors come every other year and write that the children are behind in nothing.
They do not write that the goats sometimes attend.
A city can be known by its benches.
Where people are wanted, there are backs to lean on and trees for shade.
Where they are not, the seats are short, sloping, or divided by iron bars.
Some of the best face nothing in particular, only other people.
If you want to understand a mayor, sit down and see how long you can bear it.
Paper was once made from rags, and rag collectors knew every house in the county.
Linen gave the finest sheets, and old sails the strongest.
When wood took the place of cloth, paper became cheap enough for newspapers and schools.
It also became sour, so that many books of that time turn brown and break.
Those printed on rags four centuries ago still bend like cloth.
"""
