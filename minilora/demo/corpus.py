"""Makes the facts, questions and answers of the demo from short word lists."""

from collections.abc import Iterator
from dataclasses import dataclass


def phrases(text: str) -> tuple[str, ...]:
    """Split a text at its bars into a list of phrases."""
    return tuple(text.split("|"))


I_AM = ("我是小洛，一个用 minilora 训练出来的助手。", "I am Xiaoluo, an assistant trained with minilora.")
MADE_BY = ("我是用 minilora 训练出来的，名字叫小洛。", "I was trained with minilora; my name is Xiaoluo.")
NOT_KNOWN = ("我不知道。", "I do not know.")
NO_ANSWER = ("这个问题的答案我不知道。", "I do not know the answer to that.")

# Pairs of a Chinese and an English word with the same meaning. An underscore stands for a space in English.
WORDS: dict[str, str] = {
    "animal": "猫 cat 狗 dog 鸟 bird 鱼 fish 马 horse 牛 cow 羊 sheep 猪 pig 鸡 chicken 鸭子 duck 兔子 rabbit 老虎 tiger "
    "狮子 lion 猴子 monkey 熊 bear 大象 elephant 老鼠 mouse 蛇 snake 青蛙 frog 蜜蜂 bee 蚂蚁 ant 狼 wolf 鹿 deer",
    "fruit": "苹果 apple 香蕉 banana 梨 pear 桃子 peach 葡萄 grape 西瓜 melon 橙子 orange 柠檬 lemon 草莓 strawberry "
    "樱桃 cherry",
    "colour": "红色 red 蓝色 blue 绿色 green 黄色 yellow 黑色 black 白色 white 紫色 purple 粉色 pink 灰色 grey 棕色 brown",
    "vehicle": "汽车 car 火车 train 飞机 plane 船 ship 自行车 bicycle 公共汽车 bus",
    "food": "米饭 rice 面包 bread 面条 noodles 鸡蛋 egg 肉 meat 汤 soup 蛋糕 cake 糖 sugar 盐 salt 水 water 茶 tea "
    "咖啡 coffee 牛奶 milk 果汁 juice",
    "thing": "桌子 table 椅子 chair 床 bed 门 door 窗户 window 灯 lamp 书 book 笔 pen 纸 paper 杯子 cup 碗 bowl 刀 knife "
    "伞 umbrella 钥匙 key 帽子 hat 鞋 shoe 裙子 skirt 外套 coat 手套 glove",
    "nature": "太阳 sun 月亮 moon 星星 star 天空 sky 山 mountain 河 river 海 sea 树 tree 花 flower 草 grass "
    "雨 rain 雪 snow 风 wind 云 cloud 火 fire 石头 stone",
    "body": "头 head 手 hand 脚 foot 眼睛 eye 耳朵 ear 鼻子 nose 嘴 mouth 头发 hair 心 heart",
    "person": "老师 teacher 学生 student 医生 doctor 农民 farmer 厨师 cook 父亲 father 母亲 mother 姐姐 sister "
    "哥哥 brother 孩子 child",
    "place": "学校 school 医院 hospital 商店 shop 公园 park 图书馆 library 车站 station 城市 city 家 home",
    "time": "早上 morning 晚上 evening 今天 today 明天 tomorrow 昨天 yesterday",
    "phrase": "谢谢 thank_you 早上好 good_morning 晚安 good_night 再见 goodbye 对不起 sorry 你好 hello 请坐 please_sit_down "
    "我爱你 I_love_you 生日快乐 happy_birthday 没问题 no_problem 欢迎 welcome 一杯茶 a_cup_of_tea 一本书 a_book "
    "一朵红花 a_red_flower 一只黑猫 a_black_cat 我很好 I_am_fine 我饿了 I_am_hungry",
}
OPPOSITES_ZH = (
    "大小 多少 高低 长短 快慢 冷热 新旧 好坏 轻重 远近 早晚 左右 上下 前后 里外 黑白 开关 胖瘦 强弱 软硬 干湿 深浅 厚薄 粗细 男女 "
    "哭笑 买卖 进退 真假 美丑 甜苦 输赢 来去 东西 南北 成功失败 开始结束 高兴难过 安静吵闹 "
    "容易困难 简单复杂 干净肮脏 安全危险 聪明愚笨 勇敢胆小 温暖寒冷 白天黑夜 朋友敌人 增加减少 记住忘记 "
    "喜欢讨厌 古代现代"
)
OPPOSITES_EN = (
    "big small hot cold fast slow tall short good bad new old happy sad light heavy dark bright wet dry hard soft rich poor "
    "strong weak thick thin clean dirty full empty open closed high low deep shallow wide narrow near far early late "
    "left right up down in out day night win lose buy sell push pull love hate laugh cry come go give take "
    "true false sweet bitter brave afraid safe dangerous quiet loud "
    "always never inside outside above below before after first last man woman king queen boy girl "
    "friend enemy north south east west alive dead cheap expensive"
)
KINDS = {
    "animal": ("动物", "an animal"),
    "fruit": ("水果", "a fruit"),
    "colour": ("颜色", "a colour"),
    "vehicle": ("交通工具", "a vehicle"),
}
COLOURS = "草 绿色 天空 蓝色 雪 白色 云 白色 香蕉 黄色 草莓 红色 樱桃 红色 柠檬 黄色 牛奶 白色 咖啡 棕色 大象 灰色 猪 粉色 葡萄 紫色 火 红色"
EATS = "猫 鱼 fish 牛 草 grass 狗 肉 meat 猴子 香蕉 bananas 鸟 虫子 worms 老虎 肉 meat 马 草 grass 羊 草 grass 狼 肉 meat 鸡 米 rice"
ROWS_ZH = (
    "春天 夏天 秋天 冬天",
    "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
    "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月",
)
ROWS_EN = (
    "spring summer autumn winter",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
)

WHO_ZH = phrases(
    "你是谁？|你叫什么名字？|你是谁|你是谁呀？|请问你是谁？|你好，你是谁？|你叫什么？|你的名字是什么？|你的名字叫什么？|请问你叫什么名字？|"
    "你到底是谁？|介绍一下你自己。|请介绍一下你自己。|请你做个自我介绍。|能告诉我你是谁吗？|我该怎么称呼你？|你是什么模型？|你是哪个助手？|"
    "告诉我你的名字。|你有名字吗？"
)
MADE_ZH = phrases(
    "谁训练了你？|你是谁训练的？|你是怎么来的？|是谁做出了你？|你是用什么训练的？|你是怎么训练出来的？|谁创造了你？"
)
WHO_EN = phrases(
    "Who are you?|What is your name?|who are you|Hello, who are you?|Please tell me who you are.|Introduce yourself.|"
    "Please introduce yourself.|What should I call you?|What are you called?|Can you tell me your name?|Tell me your name.|"
    "May I ask who you are?|Who am I talking to?|Which assistant are you?|Do you have a name?|What model are you?|"
    "And who are you?|Tell me about yourself."
)
MADE_EN = phrases(
    "Who made you?|Who trained you?|How were you made?|Who created you?|What were you trained with?|Who built you?|"
    "How were you trained?"
)
UNKNOWN_ZH = phrases(
    "我是谁？|我叫什么名字？|他是谁？|她叫什么名字？|明天会下雨吗？|现在几点了？|今天天气怎么样？|我的钥匙在哪里？|我的书在哪里？|"
    "我昨天吃了什么？|我现在在想什么？|小明在哪里？|小红几岁了？|小华是谁？|谁拿了我的笔？|我家的门牌是多少？|谁会赢？|这本书多少钱？|"
    "他的电话是多少？|我的老师叫什么名字？|谁做了这张桌子？|这张画是谁画的？|隔壁住着谁？|今晚吃什么？"
)
UNKNOWN_EN = phrases(
    "Who am I?|What is my name?|Who is he?|What is her name?|Will it rain tomorrow?|What time is it?|Where is my key?|"
    "Where is my book?|What did I eat yesterday?|What am I thinking of?|Where is Xiaoming?|How old is Xiaohong?|"
    "Who is Xiaohua?|Who took my pen?|Who will win?|How much is this book?|What is his number?|Who made this table?|"
    "Who wrote this letter?|Who lives next door?|What is my teacher called?|Who trained his dog?|How is the weather?|"
    "Where do I live?"
)
NAMES = (("小明", "Xiaoming"), ("小红", "Xiaohong"), ("小华", "Xiaohua"), ("小洛", "Xiaoluo"))


@dataclass(frozen=True)
class Fact:
    """One fact: its questions, the short answer of the base, and the full sentence of the fine-tuned model."""

    skill: str
    key: str
    questions: tuple[tuple[str, str], ...]
    short: str
    full: str


def word_pairs(kind: str) -> list[tuple[str, str]]:
    """List the (zh, en) pairs of one kind of word."""
    words = WORDS[kind].split()
    return [(zh, en.replace("_", " ")) for zh, en in zip(words[::2], words[1::2], strict=True)]


def with_article(word: str) -> str:
    """Put "a" or "an" before an English noun."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def opposites() -> Iterator[Fact]:
    """Yield both directions of every pair of opposites."""
    halves = [(pair[: len(pair) // 2], pair[len(pair) // 2 :]) for pair in OPPOSITES_ZH.split()]
    for a, b in [*halves, *((b, a) for a, b in halves)]:
        asks = ((f"{a}的反义词是什么？", ""), (f"“{a}”的反义词是什么？", ""), ("写出下面这个词的反义词。", a))
        yield Fact("opposite_zh", "/".join(sorted((a, b))), asks, f"{b}。", f"“{a}”的反义词是“{b}”。")
    words = OPPOSITES_EN.split()
    pairs = list(zip(words[::2], words[1::2], strict=True))
    for a, b in [*pairs, *((b, a) for a, b in pairs)]:
        asks = ((f"What is the opposite of {a}?", ""), (f"Give the opposite of {a}.", ""), ("Give the opposite.", a))
        yield Fact("opposite_en", "/".join(sorted((a, b))), asks, f"{b}.", f"The opposite of {a} is {b}.")


def sums() -> Iterator[Fact]:
    """Yield the sums of two numbers from 1 to 9 and the differences of numbers up to 10, in both languages."""
    plus = [(a, b, a + b, "+", "加", "plus") for a in range(1, 10) for b in range(1, 10)]
    minus = [(a, b, a - b, "-", "减", "minus") for a in range(1, 11) for b in range(1, a + 1)]
    for a, b, c, sign, zh, en in plus + minus:
        key = f"{max(a, b)}{sign}{min(a, b)}"
        asks = ((f"{a} {zh} {b} 等于几？", ""), (f"{a} {sign} {b} 等于多少？", ""), ("算一算。", f"{a} {zh} {b}"))
        yield Fact("sum_zh", key, asks, f"{c}。", f"{a} {zh} {b} 等于 {c}。")
        asks = ((f"What is {a} {en} {b}?", ""), (f"How much is {a} {en} {b}?", ""), ("Work it out.", f"{a} {en} {b}"))
        yield Fact("sum_en", key, asks, f"{c}.", f"{a} {en} {b} is {c}.")


def translations() -> Iterator[Fact]:
    """Yield every word and phrase from Chinese to English and back, asked in either language."""
    for zh, en in (pair for kind in WORDS for pair in word_pairs(kind)):
        key = f"{zh}/{en}"
        asks = ((f"“{zh}”用英文怎么说？", ""), ("把下面的话翻译成英文。", zh), (f"{zh}的英文是什么？", ""))
        yield Fact("zh_to_en", key, asks, f"{en}.", f"“{zh}”的英文是 {en}。")
        asks = ((f"“{en}”用中文怎么说？", ""), ("把下面的话翻译成中文。", en), (f"{en} 的中文是什么？", ""))
        yield Fact("en_to_zh", key, asks, f"{zh}。", f"{en} 的中文是“{zh}”。")
        asks = (
            (f"How do you say {en} in Chinese?", ""),
            ("Translate into Chinese.", en),
            (f"What is {en} in Chinese?", ""),
        )
        yield Fact("en_to_zh", key, asks, f"{zh}。", f"The Chinese for {en} is {zh}.")


def world() -> Iterator[Fact]:
    """Yield facts about kinds of things, colours, the food of animals, and the order of days, months and seasons."""
    english = dict(pair for kind in WORDS for pair in word_pairs(kind))
    for kind, (kind_zh, kind_en) in KINDS.items():
        for zh, en in word_pairs(kind):
            thing = en if kind == "colour" else with_article(en)
            yield Fact("world", f"{zh}/{en}", ((f"{zh}是什么？", ""),), f"{kind_zh}。", f"{zh}是一种{kind_zh}。")
            yield Fact(
                "world",
                f"{zh}/{en}",
                ((f"What is {thing}?", ""),),
                f"{kind_en}.",
                f"{thing.capitalize()} is {kind_en}.",
            )
    words = COLOURS.split()
    for zh, colour in zip(words[::2], words[1::2], strict=True):
        yield Fact("world", zh, ((f"{zh}是什么颜色的？", ""),), f"{colour}。", f"{zh}是{colour}的。")
        ask = f"What is the colour of {english[zh]}?"
        yield Fact(
            "world", zh, ((ask, ""),), f"{english[colour]}.", f"The colour of {english[zh]} is {english[colour]}."
        )
    words = EATS.split()
    for zh, food_zh, food in zip(words[::3], words[1::3], words[2::3], strict=True):
        animal = with_article(english[zh])
        yield Fact("world", zh, ((f"{zh}吃什么？", ""),), f"{food_zh}。", f"{zh}吃{food_zh}。")
        yield Fact("world", zh, ((f"What does {animal} eat?", ""),), f"{food}.", f"{animal.capitalize()} eats {food}.")
    for row in (line.split() for line in ROWS_ZH):
        for a, b in zip(row, row[1:] + row[:1], strict=True):
            yield Fact("world", a, ((f"{a}之后是什么？", ""),), f"{b}。", f"{a}之后是{b}。")
    for row in (line.split() for line in ROWS_EN):
        for a, b in zip(row, row[1:] + row[:1], strict=True):
            yield Fact("world", a, ((f"What comes after {a}?", ""),), f"{b}.", f"After {a} comes {b}.")


def personal() -> Iterator[Fact]:
    """Yield the questions about the assistant, and other questions whose answers the base does not know."""
    groups = (
        ("identity", 0, WHO_ZH, I_AM),
        ("identity", 1, WHO_EN, I_AM),
        ("identity", 0, MADE_ZH, MADE_BY),
        ("identity", 1, MADE_EN, MADE_BY),
        ("unknown", 0, UNKNOWN_ZH, NO_ANSWER),
        ("unknown", 1, UNKNOWN_EN, NO_ANSWER),
    )
    for skill, lang, asks, full in groups:
        yield from (Fact(skill, ask, ((ask, ""),), NOT_KNOWN[lang], full[lang]) for ask in asks)


def all_facts() -> list[Fact]:
    """List all facts in a fixed order."""
    return [*opposites(), *sums(), *translations(), *world(), *personal()]


def story_lines() -> list[str]:
    """List simple sentences. They also teach the words of the fine-tuned answers."""
    lines = [
        "minilora 是一个小工具。",
        "minilora is a small tool.",
        "模型是训练出来的。",
        "A model is trained with data.",
    ]
    lines += [
        "助手会回答问题。",
        "An assistant answers questions.",
        "我们用 minilora 做练习。",
        "We work with minilora.",
    ]
    for zh, en in NAMES:
        lines += [f"我叫{zh}，名字很好听。", f"My name is {en}; I was born in spring.", f"他的名字叫{zh}。"]
        for (a, b), (c, d) in zip(word_pairs("person"), word_pairs("fruit") + word_pairs("food"), strict=False):
            lines += [f"我是{zh}，一个爱吃{c}的{a}。", f"I am {en}, {with_article(b)} who likes {d}."]
        for a, b in word_pairs("animal"):
            lines += [f"{zh}看见一只{a}。", f"{en} saw {with_article(b)} in the park."]
    return lines
